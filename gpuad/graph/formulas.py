"""What an operation says of itself: its formula, its local derivatives, its rules, the programs made from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuad.array.dtypes import FLOATING
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.primitive import Primitive
from gpuad.autograd.reduced import Reduced
from gpuad.autograd.row_total import RowTotal
from gpuad.kernels import derive
from gpuad.kernels.expr import Expr, constant, substitute, to_text, variable
from gpuad.kernels.formula import Formula

_LIMIT = 160  # characters of a formula; what is longer is cut


def _text(expression: Expr) -> str:
    return to_text(expression, _LIMIT).replace(" * ", " · ").replace("-", "−")


# Rules of products, as one writes them; of other operations the source of the rule is shown.
_WRITTEN = {
    ("gemm", 0): "g @ bᵀ",
    ("gemm", 1): "aᵀ @ g",
    ("linear", 0): "g @ weight",
    ("linear", 1): "gᵀ @ x",
    ("linear", 2): "the sum of g over the rows",
}


def operand_names(op: Any, count: int) -> list[str]:
    """What the op calls its operands."""
    names = list(getattr(op, "names", ()))
    return names[:count] if len(names) >= count else [f"input {i}" for i in range(count)]


def _named(op: Elementwise, operands: Sequence[Any]) -> dict[Expr, Expr]:
    """The formula's variables by the operands' names (text) or values (numbers)."""
    swap: dict[Expr, Expr] = {}
    for v, operand in zip(op.formula.inputs, operands, strict=False):
        swap[v] = variable(operand, v.kind, v.level) if isinstance(operand, str) else constant(operand)
    return swap


def formula(op: Any, operands: Sequence[Any], params: dict[str, Any]) -> str:
    """The op applied to its operands, by name (text) or value (numbers), as a person would write it."""
    if isinstance(op, Reduced):
        term = _text(substitute(op.term.outputs[:1], _named(op, operands))[0])
        return f"{'mean' if params.get('mean', True) else 'sum'}({term})"
    if isinstance(op, Elementwise):
        return _text(substitute(op.formula.outputs[:1], _named(op, operands))[0])
    shown = [o if isinstance(o, str) else "–" if o is None else f"{o:g}" for o in operands]
    if op.name == "gemm":
        return " @ ".join(shown)
    if op.name == "linear":
        return f"{shown[0]} @ {shown[1]}ᵀ" + (f" + {shown[2]}" if operands[2] is not None else "")
    for key, value in params.items():
        if value is None or isinstance(value, bool) or key == "scale":  # how it is computed, not what
            continue
        written = repr(value)
        shown.append(f"{key}={written if len(written) < 24 else '…'}")
    return f"{op.name}({', '.join(shown)})"


def local_derivative(op: Any, i: int, operands: Sequence[Any]) -> str:
    """∂output/∂operand i in the operands' names; "" where it is no formula of elements."""
    if not isinstance(op, Elementwise) or isinstance(op, Reduced) or op.formula.is_row or op.visible > 1:
        return ""
    partial = derive.vjp(op.formula.outputs[:1], [constant(1.0)], [op.formula.inputs[i]])
    return _text(substitute(partial, _named(op, operands))[0])


def rule(op: Any, i: int) -> str:
    """How the gradient g of the output becomes that of operand i, in the op's own names; "" where it does not say."""
    if isinstance(op, Elementwise):
        wanted = op.formula.vjp((i,), op.visible, op.keeps_output).formula
        return _text(wanted.outputs[0])
    if (op.name, i) in _WRITTEN:
        return _WRITTEN[op.name, i]
    if isinstance(op, Primitive):
        name = "inputs" if op.variadic else op.names[i]
        return _lambda_text(op.rules[name].function) if name in op.rules else ""
    return ""


def _lambda_text(function: Callable) -> str:
    """The source of a lambda's body; of another function its name."""
    if function.__name__ != "<lambda>":
        return f"{function.__name__}({', '.join(inspect.signature(function).parameters)})"
    try:
        text = inspect.getsource(function)
    except (OSError, SyntaxError):  # no source at hand
        return ""
    # A block of several lambdas comes whole: ours is the one with our parameters.
    parameters = ", ".join(inspect.signature(function).parameters)
    start = text.find(f"lambda {parameters}:")
    if start < 0:
        return ""
    start += len(f"lambda {parameters}:")
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] in "([{") - (text[end] in ")]}")
        if depth < 0 or (depth == 0 and text[end] in ",\n"):
            return " ".join(text[start:end].split())
    return " ".join(text[start:].split())


def programs(op: Any, wanted: tuple[int, ...], dtype: np.dtype) -> dict[str, str]:
    """What is run for the op: for formulas the generated NumPy and CUDA sources, forward and backward, else Python."""
    found: dict[str, str] = {}
    if isinstance(op, Elementwise):
        _add_programs(found, "forward", op.term if isinstance(op, (Reduced, RowTotal)) else op.formula, dtype)
        if wanted and op.differentiable:
            computed = op.plan(wanted).formula
            if computed is None:
                found["NumPy, backward"] = found["CUDA, backward"] = "The gradient is passed on as it is: nothing runs."
            else:
                _add_programs(found, "backward", computed, dtype)
    elif isinstance(op, Primitive):
        for title, function in (("forward", op.forward), *((f"rule of {n}", r.function) for n, r in op.rules.items())):
            try:
                found[f"Python, {title}"] = inspect.cleandoc("\n" + inspect.getsource(function))
            except (OSError, TypeError):  # no source at hand
                continue
    return found


def _add_programs(found: dict[str, str], title: str, formula: Formula, dtype: np.dtype) -> None:
    if formula.is_row:
        _add_row_programs(found, title, formula.runner("numpy"))
    else:
        program = formula.runner("numpy").whole(frozenset(), frozenset(range(len(formula.inputs))))
        found[f"NumPy, {title}"] = program.source
    if dtype.char in FLOATING:
        source = formula.runner("cuda").source(dtype)
        kernel = source.find('extern "C"')  # a row kernel comes with its library of reductions
        found[f"CUDA, {title}"] = source[max(kernel, 0) :].strip()


def _add_row_programs(found: dict[str, str], title: str, runner: Any) -> None:
    if runner.rows is not None:
        scalars = frozenset(i for i, v in enumerate(runner.formula.inputs) if v.level == "scalar")
        found[f"NumPy, {title}"] = runner.rows.program(scalars).source
    sums = runner.apart.sums
    if sums is not None:
        program = sums.formula.runner("numpy").whole(frozenset(), frozenset(range(len(sums.formula.inputs))))
        found[f"NumPy, {title}, summed over the rows"] = program.source
