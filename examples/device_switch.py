"""Move a model and its optimiser to another device in the middle of training, and go on.

    python examples/device_switch.py                        # from the CPU to cuda:0
    python examples/device_switch.py --first cuda:0 --second cpu

Trains the same model twice from the same seed: once staying on the first device, once moving to the second half-way.
Only `model.to(device)` is said; the optimiser's state (here the averages of Adam) follows its parameters by itself.
"""

import argparse

import gpuad
from gpuad import nn, optim
from gpuad.utils.data import DataLoader, TensorDataset


def make_data():
    """Points in the plane on two interleaved spirals, on the CPU: (positions, which spiral)."""
    count = 512
    radius = gpuad.linspace(0.1, 1.0, count)
    positions, labels = [], []
    for spiral in (0, 1):
        angle = 6 * radius + spiral * 3.1415927
        points = gpuad.stack([radius * gpuad.cos(angle), radius * gpuad.sin(angle)], dim=1)
        positions.append(points + 0.02 * gpuad.randn(count, 2))
        labels.append(gpuad.full((count,), spiral))
    return gpuad.cat(positions), gpuad.cat(labels)


def train(epochs, first, second):
    """Train on `first` for half of the epochs and on `second` for the rest. Returns the mean loss of each epoch."""
    gpuad.manual_seed(0)
    batches = DataLoader(TensorDataset(*make_data()), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)).to(first)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)

    losses = []
    device = first
    for epoch in range(epochs):
        if epoch == epochs // 2:
            device = second
            model.to(device)
        total = 0
        for positions, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(positions.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total += loss.detach()
        losses.append(total.item() / len(batches))
    return losses


def main():
    """Train both ways and print the loss curves side by side."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", default="cpu")
    parser.add_argument("--second", default="cuda:0")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    first = gpuad.device(options.first)
    try:
        second = gpuad.device(options.second)
    except gpuad.errors.GpuadError as missing:
        print(f"{missing}\nSo there is nowhere to move to: both runs stay on {first}.\n")
        second = first

    staying = train(options.epochs, first, first)
    moving = train(options.epochs, first, second)

    print(f"epoch   stays on {str(first):8}  moves to {str(second):8}  difference")
    for epoch, (a, b) in enumerate(zip(staying, moving, strict=True)):
        moved = second is not first and epoch == options.epochs // 2
        note = f"  <- now on {second}" if moved else ""
        print(f"{epoch + 1:5}   {a:17.8f}  {b:17.8f}  {b - a:10.1e}{note}")
    largest = max(abs(b - a) / a for a, b in zip(staying, moving, strict=True))
    print(f"largest relative difference: {largest:.1e}")


if __name__ == "__main__":
    main()
