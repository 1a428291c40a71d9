"""gradcheck, gradgradcheck and check_devices: whether derivatives are right, with a report that says where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuad.array.device import Device, as_device
from gpuad.autograd.forward import jvp
from gpuad.autograd.gradients import grad
from gpuad.autograd.pytree import flatten, tree_map
from gpuad.autograd.variables import variable
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor, wrap


class GradcheckError(AutogradError):
    """What gradcheck, gradgradcheck and check_devices raise: a derivative is not what it should be."""


def _host(x: Tensor) -> np.ndarray:
    return np.asarray(x.detach().cpu().numpy(), np.float64)


def _outputs(function: Callable, inputs: Sequence[Any]) -> list[Tensor]:
    """The floating outputs of a function."""
    return [y for y in flatten(function(*inputs))[0] if isinstance(y, Tensor) and y.is_floating_point()]


def _placed(values: np.ndarray, like: Tensor) -> Tensor:
    return wrap(like.device.backend.asarray(values.astype(like.dtype)), like.device)


class _Check:
    """A function at a point, with its inputs that require grad as the variables."""

    def __init__(self, function: Callable, inputs: Any, eps: float, atol: float, rtol: float) -> None:
        self.function = function
        self.inputs = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        self.places = [i for i, x in enumerate(self.inputs) if isinstance(x, Tensor) and x.requires_grad]
        if not self.places:
            raise ValueError("gradcheck needs an input that requires grad: call requires_grad_() on one.")
        self.variables = [self.inputs[i].detach().requires_grad_() for i in self.places]
        self.eps, self.atol, self.rtol = eps, atol, rtol
        self.low = [x.dtype for x in self.variables if x.dtype != np.float64]

    def outputs(self, variables: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for other variables."""
        inputs = list(self.inputs)
        for i, x in zip(self.places, variables, strict=True):
            inputs[i] = x
        return _outputs(self.function, inputs)

    def difference(self, directions: Sequence[np.ndarray], step: float) -> list[np.ndarray]:
        """(f(x + step v) − f(x − step v)) / 2 step, in float64."""
        sides = []
        for s in (step, -step):
            moved = [_placed(_host(x) + s * v, x) for x, v in zip(self.variables, directions, strict=True)]
            sides.append([_host(y) for y in self.outputs(moved)])
        return [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]

    def unit(self, k: int, index: tuple) -> list[np.ndarray]:
        """The direction of one element of variable k."""
        directions = [np.zeros(tuple(x.shape)) for x in self.variables]
        directions[k][index] = 1.0
        return directions

    def wrong(self, got: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Where two derivatives are further apart than allowed (NaN is equal to NaN)."""
        return ~np.isclose(got, expected, self.rtol, self.atol, equal_nan=True)

    def cause(self, got: float, expected: float, directions: Sequence[np.ndarray], out: int, at: Any) -> str:
        """The likely cause of a difference, in words."""
        once, again = (_host(self.outputs(self.variables)[out]) for _ in range(2))
        if not np.array_equal(once, again, equal_nan=True):
            return "a function that is not the same at every call, such as one with random numbers in it"
        if not np.isfinite(got):
            return "the computed derivative is not finite: 0 · inf or a division by zero in the rule"
        steps = [self.difference(directions, self.eps * factor)[out] for factor in (1.0, 8.0)]
        near, far = (float(s[at]) if at is not None else float(s) for s in steps)
        if self.low and abs(got - expected) < 0.1 * abs(expected):
            return f"too low precision: {self.low[0]} inputs; check with float64 ones, x.double()"
        dtype = self.outputs(self.variables)[out].dtype
        if dtype != np.float64 and not self.low:
            return f"too low precision: the function gives {dtype} of float64 inputs"
        if abs(near - far) > 0.05 * max(abs(near), abs(far), self.atol):
            return "a non-smooth point: differences depend on the step, so there may be a kink or jump nearby"
        if got == 0:
            return "a missing term: the rule gives 0 where the function does change (a detach(), or no gradient for it)"
        ratio = expected / got
        if abs(ratio + 1) < 1e-3:
            return "a wrong sign"
        for factor in (2.0, 0.5, 3.0, 4.0, 1 / 3, 0.25):
            if abs(ratio - factor) < 1e-3 * factor:
                return f"a wrong factor: the derivative should be {factor:g} times what the rule gives"
        return "a wrong rule, or a missing term in it"

    def report(
        self, what: str, k: int, index: tuple, out: int, at: tuple, got: float, expected: float, cause: str
    ) -> GradcheckError:
        """The error of one element."""
        return GradcheckError(
            f"{what} is wrong: the derivative of output {out} at {list(at)} for input {self.places[k]} at "
            f"{list(index)}\n  computed            {got!r}\n  finite differences  {expected!r}\n"
            f"  difference          {abs(got - expected):.3e}, allowed {self.atol + self.rtol * abs(expected):.3e}\n"
            f"Likely cause: {cause}."
        )


def gradcheck(
    func: Callable, inputs: Any, *, eps: float = 1e-6, atol: float = 1e-5, rtol: float = 1e-3,
    raise_exception: bool = True, check_batched_grad: bool = False, check_forward_ad: bool = False,
    check_backward_ad: bool = True, fast_mode: bool = False,
) -> bool:  # fmt: skip
    """Whether the derivatives of `func` at `inputs` are those of central finite differences.

    inputs: a Tensor or a tuple; those that require grad are checked, in float64 if differences are to mean something.
    check_backward_ad, check_forward_ad: which modes. check_batched_grad: whether gradients taken all at once, by vmap,
    are the same. fast_mode: one random direction for all elements, instead of each element.
    Returns True. Raises GradcheckError (or returns False, raise_exception=False): which input, which element, both
    numbers, and the likely cause.
    """
    check = _Check(func, inputs, eps, atol, rtol)
    try:
        if fast_mode:
            _fast(check, check_backward_ad, check_forward_ad)
        else:
            _each(check, check_backward_ad, check_forward_ad)
        if check_batched_grad:
            _batched(check)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


def _rows(check: _Check) -> list[list[np.ndarray]]:
    """By output and variable: the Jacobian (out elements, variable elements) from reverse mode."""
    outs = check.outputs(check.variables)
    rows = []
    for y in outs:
        blocks = [np.zeros((y.numel(), x.numel())) for x in check.variables]
        if y.requires_grad:
            for e in range(y.numel()):
                seed = np.zeros(y.numel())
                seed[e] = 1.0
                weight = _placed(seed.reshape(tuple(y.shape)), y)
                found = grad(y, check.variables, weight, True, materialize_grads=True)
                for block, g, x in zip(blocks, found, check.variables, strict=True):
                    if tuple(g.shape) != tuple(x.shape) or g.dtype != x.dtype:  # type: ignore[union-attr]
                        raise GradcheckError(
                            f"A gradient has shape {tuple(g.shape)} and dtype {g.dtype}, its input "  # type: ignore[union-attr]
                            f"{tuple(x.shape)} and {x.dtype}; they must be equal."
                        )
                    block[e] = _host(g).reshape(-1)  # type: ignore[arg-type]
        rows.append(blocks)
    return rows


def _each(check: _Check, backward: bool, forward: bool) -> None:
    rows = _rows(check) if backward else []
    for k, x in enumerate(check.variables):
        for index in np.ndindex(tuple(x.shape)):
            directions = check.unit(k, index)
            expected = check.difference(directions, check.eps)
            column = int(np.ravel_multi_index(index, tuple(x.shape))) if index else 0
            computed = []
            if backward:
                got = [rows[o][k][:, column].reshape(e.shape) for o, e in enumerate(expected)]
                computed.append(("The gradient (reverse mode)", got))
            if forward:
                computed.append(("The tangent (forward mode)", _tangents(check, directions)))
            for what, found in computed:
                for out, (a, b) in enumerate(zip(found, expected, strict=True)):
                    wrong = check.wrong(a, b)
                    if wrong.any():
                        at = tuple(int(i) for i in np.argwhere(wrong)[0])
                        cause = check.cause(float(a[at]), float(b[at]), directions, out, at)
                        raise check.report(what, k, index, out, at, float(a[at]), float(b[at]), cause)


def _tangents(check: _Check, directions: Sequence[np.ndarray]) -> list[np.ndarray]:
    moving = tuple(_placed(v, x) for v, x in zip(directions, check.variables, strict=True))
    points = tuple(x.detach() for x in check.variables)
    return [_host(t) for t in jvp(lambda *xs: check.outputs(xs), points, moving)[1]]


def _fast(check: _Check, backward: bool, forward: bool) -> None:
    """⟨u, J v⟩ for random u and v, by each mode and by differences."""
    generator = np.random.default_rng(0)
    directions = [generator.standard_normal(tuple(x.shape)) for x in check.variables]
    expected = check.difference(directions, check.eps)
    for out, slope in enumerate(expected):
        weight = generator.standard_normal(slope.shape)
        number = float((weight * slope).sum())
        computed = []
        if backward:
            y = check.outputs(check.variables)[out]
            found: Any = [x.new_zeros(x.shape) for x in check.variables]
            if y.requires_grad:
                found = grad(y, check.variables, _placed(weight, y), True, materialize_grads=True)
            total = sum(float((_host(g) * v).sum()) for g, v in zip(found, directions, strict=True))
            computed.append(("The gradient (reverse mode)", total))
        if forward:
            total = float((weight * _tangents(check, directions)[out]).sum())
            computed.append(("The tangent (forward mode)", total))
        for what, got in computed:
            if check.wrong(np.array(got), np.array(number)):
                raise GradcheckError(
                    f"{what} is wrong: the derivative of output {out} along a random direction of all inputs\n"
                    f"  computed            {got!r}\n  finite differences  {number!r}\n"
                    "Call gradcheck(fast_mode=False) to learn which input and which element."
                )


def _batched(check: _Check) -> None:
    for out, y in enumerate(check.outputs(check.variables)):
        if not y.requires_grad:
            continue
        many = np.random.default_rng(0).standard_normal((3, *y.shape))
        weights = _placed(many, y)
        together = grad(y, check.variables, weights, True, is_grads_batched=True, materialize_grads=True)
        for i in range(3):
            alone = grad(y, check.variables, weights[i], True, materialize_grads=True)
            for k, (a, b) in enumerate(zip(together, alone, strict=True)):
                if check.wrong(_host(a[i]), _host(b)).any():  # type: ignore[index, arg-type]
                    raise GradcheckError(
                        f"Gradients taken all at once (is_grads_batched) differ from those taken one by one: output "
                        f"{out}, input {check.places[k]}, by {np.abs(_host(a[i]) - _host(b)).max():.3e}. The batching "  # type: ignore[index, arg-type]
                        "rule of an operation in it is wrong."
                    )


def gradgradcheck(
    func: Callable, inputs: Any, grad_outputs: Any = None, *, eps: float = 1e-6, atol: float = 1e-5,
    rtol: float = 1e-3, raise_exception: bool = True, check_fwd_over_rev: bool = False, fast_mode: bool = False,
) -> bool:  # fmt: skip
    """Whether second derivatives are right: gradcheck of the gradient of `func`, weighted by grad_outputs.

    grad_outputs: a weight for each output, random unless given; they are checked as inputs too.
    """
    given = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    places = [i for i, x in enumerate(given) if isinstance(x, Tensor) and x.requires_grad]
    outs = _outputs(func, given)
    if grad_outputs is None:
        generator = np.random.default_rng(0)
        weights = [_placed(generator.standard_normal(tuple(y.shape)), y).requires_grad_() for y in outs]
    else:
        weights = list(grad_outputs) if isinstance(grad_outputs, (tuple, list)) else [grad_outputs]

    def gradient(*arguments: Any) -> list[Any]:
        inner, us = list(arguments[: len(given)]), arguments[len(given) :]
        found = [(y, u) for y, u in zip(_outputs(func, inner), us, strict=True) if y.requires_grad]
        chosen = [inner[i] for i in places]
        return list(grad([y for y, _ in found], chosen, [u for _, u in found], create_graph=True,
                         materialize_grads=True))  # fmt: skip

    def with_graph(*arguments: Any) -> list[Any]:
        inner = list(arguments)
        for i in places:
            inner[i] = variable(inner[i])
        return gradient(*inner)

    return gradcheck(
        with_graph, [*given, *weights], eps=eps, atol=atol, rtol=rtol, raise_exception=raise_exception,
        check_forward_ad=check_fwd_over_rev, fast_mode=fast_mode,
    )  # fmt: skip


def check_devices(
    f: Callable, *args: Any, devices: Sequence[Any] | None = None, rtol: float = 1e-4, atol: float = 1e-5
) -> dict[str, float]:
    """Compare f(*args) and its gradients on every device that is present (or on `devices`) with the first of them.

    args: Tensors (nested in dicts, lists and tuples) and what else f takes; floating Tensors get gradients, of the sum
    of f's floating outputs weighted by fixed random numbers. Returns the largest difference of each device but one.
    Raises GradcheckError that names the value or gradient, its element and both numbers, or the dtypes that differ.
    """
    from gpuad import cuda

    places = [as_device("cpu"), *(as_device(f"cuda:{i}") for i in range(cuda.device_count()))]
    places = places if devices is None else [as_device(d) for d in devices]
    reference, *others = [_on_device(f, args, place) for place in places]
    largest = {}
    for place, results in zip(places[1:], others, strict=True):
        worst = 0.0
        if [name for name, _ in reference] != [name for name, _ in results]:
            raise GradcheckError(f"f gives other outputs on {place} than on {places[0]}; their structures differ.")
        for (name, a), (_, b) in zip(reference, results, strict=True):
            if a.dtype != b.dtype or a.shape != b.shape:
                raise GradcheckError(
                    f"The {name} is {a.dtype} {a.shape} on {places[0]} and {b.dtype} {b.shape} on {place}."
                )
            x, y = a.astype(np.float64), b.astype(np.float64)
            wrong = ~np.isclose(y, x, rtol, atol, equal_nan=True)
            if wrong.any():
                at = tuple(int(i) for i in np.argwhere(wrong)[0])
                raise GradcheckError(
                    f"The {name} differs at {list(at)}: {x[at]!r} on {places[0]}, {y[at]!r} on {place}. "
                    f"Allowed are {atol:g} + {rtol:g} · |value|; {int(wrong.sum())} of {wrong.size} elements differ."
                )
            worst = max(worst, float(np.max(np.abs(x - y), initial=0.0, where=np.isfinite(x - y))))
        largest[str(place)] = worst
    return largest


def _on_device(f: Callable, args: tuple, place: Device) -> list[tuple[str, np.ndarray]]:
    """Named values and gradients of f on a device, on the host."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        there = x.detach().to(place)
        return there.requires_grad_() if there.is_floating_point() else there

    given = tree_map(moved, args)
    outs = [y for y in flatten(f(*given))[0] if isinstance(y, Tensor)]
    results = [(f"value of output {i}", y.detach().cpu().numpy()) for i, y in enumerate(outs)]
    leaves = [x for x in flatten(given)[0] if isinstance(x, Tensor) and x.requires_grad]
    live = [y for y in outs if y.requires_grad]
    if live and leaves:
        generator = np.random.default_rng(0)
        weights = [_placed(generator.standard_normal(tuple(y.shape)), y) for y in live]
        found = grad(live, leaves, weights, materialize_grads=True)
        gradients: Any = enumerate(found)
        results += [(f"gradient of floating input {i}", g.cpu().numpy()) for i, g in gradients]
    return results
