"""Activations as modules; the formulas are those of nn.functional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpuad
from gpuad import Tensor

from . import functional as F
from . import init as initialise
from .module import Module
from .parameter import Parameter


class _Activation(Module):
    """What the activations share: a repr that shows the hyperparameters named in `shown`."""

    shown: tuple[str, ...] = ()
    inplace = False

    def extra_repr(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in self.shown]
        return ", ".join(parts + ["inplace=True"] * self.inplace)

    def _call(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        return function(*args, inplace=True) if self.inplace else function(*args)


class _InplaceActivation(_Activation):
    """An activation whose only choice is whether it overwrites its input."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace


class Sigmoid(_Activation):
    """1 / (1 + exp(−x))."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.sigmoid(input)


class Tanh(_Activation):
    """tanh(x)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.tanh(input)


class LogSigmoid(_Activation):
    """log(sigmoid(x))."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.logsigmoid(input)


class Softsign(_Activation):
    """x / (1 + |x|)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.softsign(input)


class Tanhshrink(_Activation):
    """x − tanh(x)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.tanhshrink(input)


class ReLU(_InplaceActivation):
    """max(x, 0)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.relu, input)


class ReLU6(_InplaceActivation):
    """min(max(x, 0), 6)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.relu6, input)


class SELU(_InplaceActivation):
    """scale · (max(x, 0) + min(alpha (exp(x) − 1), 0)); Klambauer et al., arXiv:1706.02515, give the constants."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.selu, input)


class SiLU(_InplaceActivation):
    """x · sigmoid(x)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.silu, input)


class Mish(_InplaceActivation):
    """x · tanh(softplus(x))."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.mish, input)


class Hardsigmoid(_InplaceActivation):
    """min(max(x / 6 + 1/2, 0), 1)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.hardsigmoid, input)


class Hardswish(_InplaceActivation):
    """x · hardsigmoid(x)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.hardswish, input)


class LeakyReLU(_Activation):
    """x where x > 0, else negative_slope · x."""

    shown = ("negative_slope",)

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.leaky_relu, input, self.negative_slope)


class ELU(_Activation):
    """x where x > 0, else alpha · (exp(x) − 1)."""

    shown = ("alpha",)

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.elu, input, self.alpha)


class CELU(_Activation):
    """max(x, 0) + min(alpha (exp(x / alpha) − 1), 0)."""

    shown = ("alpha",)

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.celu, input, self.alpha)


class Hardtanh(_Activation):
    """x held between min_val and max_val."""

    shown = ("min_val", "max_val")

    def __init__(self, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        self.min_val = min_val
        self.max_val = max_val
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.hardtanh, input, self.min_val, self.max_val)


class Threshold(_Activation):
    """x where x > threshold, else value."""

    shown = ("threshold", "value")

    def __init__(self, threshold: float, value: float, inplace: bool = False) -> None:
        super().__init__()
        self.threshold = threshold
        self.value = value
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return self._call(F.threshold, input, self.threshold, self.value)


class Softplus(_Activation):
    """log(1 + exp(beta x)) / beta; x itself where beta x > threshold."""

    shown = ("beta", "threshold")

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__()
        self.beta = beta
        self.threshold = threshold

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.softplus(input, self.beta, self.threshold)


class _Shrink(_Activation):
    def __init__(self, lambd: float = 0.5) -> None:
        super().__init__()
        self.lambd = lambd

    def extra_repr(self) -> str:
        return str(self.lambd)


class Hardshrink(_Shrink):
    """x where |x| > lambd, else 0."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.hardshrink(input, self.lambd)


class Softshrink(_Shrink):
    """x moved towards 0 by lambd, and 0 within it."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.softshrink(input, self.lambd)


class GLU(_Activation):
    """a · sigmoid(b), a and b the halves of x along dim."""

    shown = ("dim",)

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation along dim."""
        return F.glu(input, self.dim)


class Softmax(_Activation):
    """exp(x) / sum(exp(x)) along dim."""

    shown = ("dim",)

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation along dim."""
        return F.softmax(input, self.dim)


class Softmin(_Activation):
    """softmax(−x) along dim."""

    shown = ("dim",)

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation along dim."""
        return F.softmin(input, self.dim)


class LogSoftmax(_Activation):
    """log(softmax(x)) along dim."""

    shown = ("dim",)

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation along dim."""
        return F.log_softmax(input, self.dim)


class GELU(_Activation):
    """x · Φ(x), Φ the normal distribution function; approximate='tanh' for its tanh approximation.

    Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
    """

    shown = ("approximate",)

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.gelu(input, approximate=self.approximate)


class PReLU(_Activation):
    """x where x > 0, else weight · x, with a learned weight for all channels or (num_parameters) for each."""

    shown = ("num_parameters",)
    weight: Parameter

    def __init__(self, num_parameters: int = 1, init: float = 0.25, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_parameters = num_parameters
        self.init = init
        self.weight = Parameter(gpuad.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to `init`."""
        initialise.constant_(self.weight, self.init)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation elementwise; channels are dimension 1."""
        return F.prelu(input, self.weight)
