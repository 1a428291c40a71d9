"""CuPy kernels of one's own inside a gpuad function, with their gradient: RawKernel forwards, ElementwiseKernel back.

    python examples/cupy_kernel.py
    python examples/cupy_kernel.py --device cuda:1

The kernels get the tensors' own memory (x.cupy()), on the stream that gpuad works on, so nothing is copied and nothing
waits. Where a formula is enough, gpuad.fuse makes both kernels by itself: see custom_kernel.py.
"""

import argparse
import functools

import numpy

import gpuad

THREADS = 128
FORWARD = r"""
extern "C" __global__ void moving_average(const double* x, const double* weight, double* y, int rows, int columns) {
  // y[r, c] = Σ_k weight[k] · x[r, c + k − 1] over k = 0, 1, 2; x is 0 beyond the ends of its row
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * columns) return;
  const int column = i % columns;
  double sum = weight[1] * x[i];
  if (column > 0) sum += weight[0] * x[i - 1];
  if (column + 1 < columns) sum += weight[2] * x[i + 1];
  y[i] = sum;
}
"""


@functools.cache
def kernels():
    """The two kernels, compiled by CuPy on first use."""
    import cupy

    forward = cupy.RawKernel(FORWARD, "moving_average")
    backward = cupy.ElementwiseKernel(
        "raw T g, raw T weight, int64 columns",
        "T dx",
        """
        const long long column = i % columns;
        dx = weight[1] * g[i];
        if (column + 1 < columns) dx += weight[0] * g[i + 1];
        if (column > 0) dx += weight[2] * g[i - 1];
        """,
        "moving_average_backward",
    )
    return forward, backward


class MovingAverage(gpuad.autograd.Function):
    """A weighted average of each element and its neighbours in the row; x is (rows, columns), weight is (3,)."""

    @staticmethod
    def forward(ctx, x, weight):
        """Launch the RawKernel."""
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        y = gpuad.empty_like(x)
        rows, columns = x.shape
        grid = (-(-x.numel() // THREADS),)
        arguments = (x.detach().cupy(), weight.detach().cupy(), y.cupy(), numpy.int32(rows), numpy.int32(columns))
        kernels()[0](grid, (THREADS,), arguments)
        return y

    @staticmethod
    def backward(ctx, g):
        """Launch the ElementwiseKernel for x; the gradient of the three weights is gpuad's own arithmetic."""
        x, weight = ctx.saved_tensors
        g = g.contiguous()
        dx = gpuad.empty_like(x)
        # CuPy's own kernels and functions (cupy.exp, ElementwiseKernel …) take tensors as they are.
        kernels()[1](g, weight, x.shape[1], dx.cupy())
        left, right = (g[:, 1:] * x[:, :-1]).sum(), (g[:, :-1] * x[:, 1:]).sum()
        return dx, gpuad.stack([left, (g * x).sum(), right])


def finite_difference(function, at, step=1e-6):
    """The gradient of function(at).sum() by central differences, one entry at a time."""
    gradient = gpuad.zeros_like(at)
    for index in range(at.numel()):
        bump = gpuad.zeros_like(at)
        bump.view(-1)[index] = step
        gradient.view(-1)[index] = (function(at + bump).sum() - function(at - bump).sum()) / (2 * step)
    return gradient


def main():
    """Run the function on a CUDA device, and show its gradients beside finite differences."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    try:
        device = gpuad.device(options.device)
    except gpuad.errors.DeviceError as error:
        print(f"Nothing to show: {error}")
        return
    if device.type != "cuda":
        print(f"Nothing to show: CuPy's kernels run on CUDA devices, and this is {device}. Give --device cuda.")
        return

    gpuad.manual_seed(0)
    x = gpuad.randn(4, 6, dtype=gpuad.float64, device=device, requires_grad=True)
    weight = gpuad.tensor([0.25, 0.5, 0.25], dtype=gpuad.float64, device=device, requires_grad=True)
    cotangent = gpuad.randn(4, 6, dtype=gpuad.float64, device=device)

    y = MovingAverage.apply(x, weight)
    print(f"moving average on {device}, first row:\n{y.detach()[0].cpu().numpy()}")
    (y * cotangent).sum().backward()
    with gpuad.no_grad():
        expected = {
            "x": finite_difference(lambda at: MovingAverage.apply(at, weight) * cotangent, x),
            "weight": finite_difference(lambda at: MovingAverage.apply(x, at) * cotangent, weight),
        }
    for name, tensor in (("x", x), ("weight", weight)):
        error = (tensor.grad - expected[name]).abs().max().item()
        print(f"gradient of {name}, largest difference from finite differences: {error:.1e}")


if __name__ == "__main__":
    main()
