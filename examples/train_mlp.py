"""Train a small network on real handwritten digits, on the CPU or on a CUDA device.

    python examples/train_mlp.py                        # scikit-learn's 1797 digits of 8x8 pixels
    python examples/train_mlp.py --data mnist/          # MNIST, from its four IDX files (.gz or not) in that folder
    python examples/train_mlp.py --device cuda:1 --epochs 30 --plot curve.png

The same seed gives the same first weights, the same batches and so the same losses on every device.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import gpuad
from gpuad import nn, optim
from gpuad.utils.data import DataLoader, TensorDataset


def load_sklearn_digits():
    """scikit-learn's digits as (train images, train labels, test images, test labels); a fifth is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return x_train, y_train, x_test, y_test


def load_mnist(folder):
    """MNIST from `train-images-idx3-ubyte` and its three siblings in `folder`, with or without `.gz`; as above."""

    def read(name):
        # An IDX file: two zero bytes, the element type (8: uint8), the number of axes, their lengths as big-endian
        # 32-bit integers, then the elements.
        plain = Path(folder, name)
        raw = plain.read_bytes() if plain.exists() else gzip.decompress(Path(folder, name + ".gz").read_bytes())
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

    def images(name):
        pixels = read(name)
        return pixels.reshape(len(pixels), -1).astype(np.float32) / 255

    def labels(name):
        return read(name).astype(np.int64)

    return (
        images("train-images-idx3-ubyte"),
        labels("train-labels-idx1-ubyte"),
        images("t10k-images-idx3-ubyte"),
        labels("t10k-labels-idx1-ubyte"),
    )


def count_correct(logits, labels):
    """The number of rows of `logits` whose largest entry is at the label."""
    return (logits.argmax(dim=1) == labels).sum()


def train_epoch(model, optimizer, batches):
    """One pass over the batches. Returns the mean loss and the accuracy, measured as training goes."""
    model.train()
    loss_sum = correct = seen = 0
    for images, labels in batches:
        optimizer.zero_grad()
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        # Added up on the device: reading a number on the host would wait for the device at every batch.
        loss_sum += loss.detach() * len(labels)
        correct += count_correct(logits.detach(), labels)
        seen += len(labels)
    return loss_sum.item() / seen, correct.item() / seen


def main():
    """Parse the arguments, train, and show how it went."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="folder with MNIST's IDX files (default: scikit-learn's digits)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda:0" if gpuad.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="draw loss and accuracy to this file (.png, .pdf, .svg)")
    parser.add_argument("--curve", metavar="FILE", help="write loss and accuracy of each epoch to this file, as JSON")
    options = parser.parse_args()

    gpuad.manual_seed(options.seed)
    device = gpuad.device(options.device)
    data = load_mnist(options.data) if options.data else load_sklearn_digits()
    x_train, y_train, x_test, y_test = (gpuad.from_numpy(part).to(device) for part in data)
    batches = DataLoader(TensorDataset(x_train, y_train), batch_size=options.batch_size, shuffle=True)

    model = nn.Sequential(nn.Linear(x_train.shape[1], 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)

    console = Console()
    console.print(f"{len(x_train)} images to learn from, {len(x_test)} held out, on {device}", highlight=False)
    console.print(model, highlight=False, markup=False)
    history = {"loss": [], "accuracy": [], "test_accuracy": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.epochs)
        for _ in range(options.epochs):
            loss, accuracy = train_epoch(model, optimizer, batches)
            schedule.step()
            model.eval()
            with gpuad.no_grad():
                test_accuracy = count_correct(model(x_test), y_test).item() / len(y_test)
            for name, value in zip(history, (loss, accuracy, test_accuracy), strict=True):
                history[name].append(value)
            shown = f"loss {loss:.4f}  accuracy {accuracy:.2%}  held out {test_accuracy:.2%}"
            progress.update(task, advance=1, description=shown)
    seconds = time.perf_counter() - start

    table = Table("epoch", "loss", "accuracy", "held out", title=f"{options.epochs} epochs in {seconds:.1f} s")
    every = max(1, options.epochs // 10)
    for epoch, (loss, accuracy, test_accuracy) in enumerate(zip(*history.values(), strict=True), start=1):
        if epoch % every == 0 or epoch in (1, options.epochs):
            table.add_row(str(epoch), f"{loss:.6f}", f"{accuracy:.2%}", f"{test_accuracy:.2%}")
    console.print(table)
    print(f"seed {options.seed}  loss {history['loss'][-1]!r}  held-out accuracy {history['test_accuracy'][-1]!r}")

    if options.curve:
        Path(options.curve).write_text(json.dumps({"device": str(device), "seed": options.seed, **history}))
    if options.plot:
        plot(history, options.plot)


def plot(history, file):
    """Draw the loss, and the accuracy on seen and on held-out images, over the epochs."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, with no display
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    epochs = range(1, len(history["loss"]) + 1)
    left.semilogy(epochs, history["loss"])
    left.set(xlabel="epoch", ylabel="loss", title="cross-entropy")
    right.plot(epochs, history["accuracy"], label="seen")
    right.plot(epochs, history["test_accuracy"], label="held out")
    right.set(xlabel="epoch", ylabel="accuracy", title="accuracy")
    right.legend()
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
