"""Activation functions: each op is its formula. Sources: the formulas in the documentation of torch.nn.functional."""

from __future__ import annotations

import math
from typing import Any

from gpuad.autograd.elementwise import elementwise
from gpuad.autograd.op import function
from gpuad.kernels.scalar import abs, clamp, erf, exp, expm1, log, log1p, minimum, tanh, where
from gpuad.kernels.scalar import relu as scalar_relu
from gpuad.kernels.scalar import sigmoid as scalar_sigmoid
from gpuad.ops.samples import S, unary


def _softplus(x: Any, beta: Any, threshold: Any) -> Any:
    return where(x * beta > threshold, x, log1p(exp(x * beta)) / beta)


relu = elementwise("relu", lambda input: scalar_relu(input), unary(-2, 2, 0), "max(input, 0).", in_place=True)
sigmoid = elementwise("sigmoid", lambda input: scalar_sigmoid(input), unary(), "1 / (1 + exp(−input)).", in_place=True)
silu = elementwise("silu", lambda input: input * scalar_sigmoid(input), unary(), "input · sigmoid(input).", nn=True)
mish = elementwise("mish", lambda input: input * tanh(_softplus(input, 1.0, 20.0)), unary(),
                   "input · tanh(softplus(input)).", nn=True)  # fmt: skip

softplus = elementwise(
    "softplus", lambda input, beta=1.0, threshold=20.0: _softplus(input, beta, threshold),
    [(S((3, 4)), 1.0, 20.0), (S((5,), -60, 60), 2.0, 20.0)],
    "Smooth relu, log(1 + exp(beta input)) / beta; the identity where beta input > threshold.", nn=True,
    autocast="float32",
)  # fmt: skip
gelu_erf = elementwise("gelu", lambda input: input * 0.5 * (1 + erf(input * (1 / math.sqrt(2)))), unary(),
                       "input · Φ(input), Φ the normal distribution function.", nn=True)  # fmt: skip
gelu_tanh = elementwise(
    "gelu_tanh",
    lambda input: 0.5 * input * (1 + tanh(math.sqrt(2 / math.pi) * (input + 0.044715 * input**3))),
    unary(), "The approximation of gelu by tanh.", nn=True,
)  # fmt: skip
elu = elementwise("elu", lambda input, alpha=1.0: where(input > 0, input, alpha * expm1(input)),
                  [(S((3, 4), -2, 2, (0,)), 1.3)], "input where positive, else alpha (exp(input) − 1).",
                  nn=True)  # fmt: skip
celu = elementwise(
    "celu", lambda input, alpha=1.0: where(input > 0, input, alpha * expm1(input / alpha)),
    [(S((3, 4), -2, 2, (0,)), 1.3)], "input where positive, else alpha (exp(input / alpha) − 1).", method=False,
)  # fmt: skip
# Klambauer et al., "Self-Normalizing Neural Networks", arXiv:1706.02515, equation 14.
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
selu = elementwise(
    "selu", lambda input: _SELU_SCALE * where(input > 0, input, _SELU_ALPHA * expm1(input)),
    unary(-2, 2, 0), "scale · (input where positive, else alpha (exp(input) − 1)); Klambauer et al. 2017.",
    method=False,
)  # fmt: skip
leaky_relu = elementwise(
    "leaky_relu", lambda input, negative_slope=0.01: where(input > 0, input, input * negative_slope),
    [(S((3, 4), -2, 2, (0,)), 0.1)], "input where positive, else negative_slope · input.", nn=True,
)  # fmt: skip
prelu = elementwise("prelu", lambda input, weight: where(input > 0, input, input * weight),
                     [(S((3, 4), -2, 2, (0,)), S((4,)))], "leaky_relu with a learned slope.", method=False,
                     autocast="lower")  # fmt: skip
relu6 = elementwise("relu6", lambda input: clamp(input, 0.0, 6.0), [(S((3, 4), -8, 8, (0, 6)),)],
                    "min(max(input, 0), 6).", nn=True)  # fmt: skip
hardtanh = elementwise("hardtanh", lambda input, min_val=-1.0, max_val=1.0: clamp(input, min_val, max_val),
                       [(S((3, 4), -2, 2, (-1, 1)), -1.0, 1.0)], "input cut to [min_val, max_val].",
                       nn=True)  # fmt: skip
hardsigmoid = elementwise("hardsigmoid", lambda input: clamp(input * (1 / 6) + 0.5, 0.0, 1.0), unary(),
                          "input / 6 + 1/2 cut to [0, 1].", nn=True)  # fmt: skip
hardswish = elementwise("hardswish", lambda input: input * clamp(input * (1 / 6) + 0.5, 0.0, 1.0), unary(),
                        "input · hardsigmoid(input).", nn=True)  # fmt: skip
softsign = elementwise("softsign", lambda input: input / (abs(input) + 1), unary(-2, 2, 0), "input / (1 + |input|).",
                       nn=True)  # fmt: skip
tanhshrink = elementwise("tanhshrink", lambda input: input - tanh(input), unary(), "input − tanh(input).",
                         nn=True)  # fmt: skip
softshrink = elementwise(
    "softshrink",
    lambda input, lambd=0.5: where(input > lambd, input - lambd, where(input < -lambd, input + lambd, 0.0)),
    [(S((3, 4), -2, 2, (-0.5, 0.5)), 0.5)], "input moved towards 0 by lambd, 0 within.", nn=True,
)  # fmt: skip
hardshrink = elementwise("hardshrink", lambda input, lambd=0.5: where(abs(input) > lambd, input, 0.0),
                         [(S((3, 4), -2, 2, (-0.5, 0.5, 0)), 0.5)], "input, 0 where |input| ≤ lambd.",
                         nn=True)  # fmt: skip
threshold = elementwise("threshold", lambda input, threshold, value: where(input > threshold, input, value),
                        [(S((3, 4), -2, 2, (0.5,)), 0.5, -1.0)], "input where it is above threshold, else value.",
                        nn=True)  # fmt: skip
logsigmoid = elementwise("logsigmoid", lambda input: minimum(input, 0) - log1p(exp(-abs(input))), unary(-2, 2, 0),
                         "log(sigmoid(input)) without overflow.", nn=True)  # fmt: skip
logit = elementwise("logit", lambda input: log(input / (1 - input)), unary(0.1, 0.9), "log(input / (1 − input)).")


@function(name="gelu", nn=True)
def gelu(input: Any, approximate: str = "none") -> Any:
    """input · Φ(input), Φ the normal distribution function; approximate="tanh" for Hendrycks & Gimpel's formula.

    Source: Hendrycks & Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
    """
    if approximate == "none":
        return gelu_erf(input)
    if approximate == "tanh":
        return gelu_tanh(input)
    raise ValueError(f"approximate is 'none' or 'tanh', got {approximate!r}.")
