"""A function of one's own as one kernel: `gpuad.fuse` makes the forward pass, the gradient and their CUDA source.

    python examples/custom_kernel.py
    python examples/custom_kernel.py --device cuda:0

The function is ordinary Python on numbers. It is traced once; its derivative is taken from the formula, so forward is
one kernel and backward, for all inputs together, is another, on a GPU as on the CPU.
"""

import argparse

import gpuad


@gpuad.fuse
def swish(x, beta):
    """x · sigmoid(beta · x), whose steepness beta can be learnt."""
    return x * gpuad.sigmoid(beta * x)


def finite_difference(function, at, step=1e-6):
    """The gradient of function(at).sum() by central differences, one entry at a time."""
    gradient = gpuad.zeros_like(at)
    for index in range(at.numel()):
        bump = gpuad.zeros_like(at)
        bump.view(-1)[index] = step
        gradient.view(-1)[index] = (function(at + bump).sum() - function(at - bump).sum()) / (2 * step)
    return gradient


def main():
    """Show the generated CUDA source, then the gradients beside finite differences."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0" if gpuad.cuda.is_available() else "cpu")
    options = parser.parse_args()

    gpuad.manual_seed(0)
    x = gpuad.randn(3, 4, dtype=gpuad.float64, device=options.device, requires_grad=True)
    beta = gpuad.tensor(1.5, dtype=gpuad.float64, device=options.device, requires_grad=True)

    print("// forward\n" + swish.cuda_source(x.dtype))
    print("// backward: both gradients at once\n" + swish.cuda_source_of_gradient(x.dtype))

    swish(x, beta).sum().backward()
    with gpuad.no_grad():
        expected = {
            "x": finite_difference(lambda at: swish(at, beta), x),
            "beta": finite_difference(lambda at: swish(x, at), beta),
        }
    for name, tensor in (("x", x), ("beta", beta)):
        error = (tensor.grad - expected[name]).abs().max().item()
        print(f"gradient of {name}, on {tensor.device}:\n{tensor.grad.cpu().numpy()}")
        print(f"largest difference from finite differences: {error:.1e}\n")


if __name__ == "__main__":
    main()
