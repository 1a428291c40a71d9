"""Expressions: the small graph that a scalar formula becomes when it is traced once.

An expression is a variable, a constant or a scalar function of expressions. Equal expressions are the same object
(they are interned when made), so common subexpressions are shared without a search, and `is` compares.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

from gpuad.errors import FormulaError


class ScalarFunction:
    """A function of scalars that formulas are made of.

    name: as in error texts and in CUDA comments.
    numpy: the ufunc (or a callable with `out=`) that computes it on arrays.
    cuda: a C expression with {0}, {1} … for the arguments; {T} is the compute type.
    partials: one function of (arguments..., result) per argument, giving the partial derivative as an expression;
        None where the derivative is zero everywhere it exists.
    result: "same" as its arguments, "bool", or "float" (integers are computed in the default floating dtype).
    lowered: a function of expressions that says the same with simpler functions, for NumPy, which has no such ufunc.
    across: "" for elementwise functions; "row" for those that reduce a row to one value; "column" and "length" for
        the position in a row and its length.
    """

    __slots__ = ("name", "numpy", "cuda", "partials", "result", "lowered", "across")

    def __init__(
        self,
        name: str,
        numpy: Callable | None,
        cuda: str,
        partials: Sequence[Callable | None] = (),
        result: str = "same",
        lowered: Callable[..., Expr] | None = None,
        across: str = "",
    ) -> None:
        self.name, self.numpy, self.cuda, self.lowered = name, numpy, cuda, lowered
        self.partials, self.result, self.across = tuple(partials), result, across

    def __repr__(self) -> str:
        return self.name

    def __call__(self, *args: Any) -> Expr:
        return apply(self, *args)


class Expr:
    """A node of a formula: `function` applied to `args`; leaves are Variable and Constant."""

    __slots__ = ("function", "args", "__weakref__")

    function: ScalarFunction
    args: tuple[Expr, ...]

    # Symbolic scalars stay symbolic: what Python would decide by value, a kernel cannot.
    def __bool__(self) -> bool:
        raise FormulaError(
            "A formula is traced once with symbolic numbers, so `if`, `and`, `or`, `not`, `while`, min() and max() "
            f"cannot look at the value of {self}. Write gpuad.where(condition, a, b), gpuad.maximum(a, b), "
            "gpuad.minimum(a, b), or &, |, ~ instead."
        )

    def _no_number(self) -> Any:
        raise FormulaError(
            f"A formula is traced once with symbolic numbers, so {self} has no value yet: int(), float(), range(), "
            "math.* and len() cannot be used in it. Use gpuad's functions (gpuad.exp, gpuad.floor, …) instead."
        )

    __int__ = __float__ = __index__ = __complex__ = __len__ = __iter__ = _no_number

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Expr:
        """np.exp(x) and the like, and NumPy scalars as left operands."""
        for function in METHODS.values():
            if method == "__call__" and not kwargs and getattr(function, "numpy", None) is ufunc:
                return function(*inputs)
        raise FormulaError(
            f"np.{ufunc.__name__} cannot be used in a formula in this form; use gpuad's functions (gpuad.exp, …)."
        )

    def __getitem__(self, key: Any) -> Expr:
        raise FormulaError(
            f"{self}[…] is not elementwise: a formula sees one element at a time. Index the tensors before the call."
        )

    def __getattr__(self, name: str) -> Any:
        method = METHODS.get(name)
        if method is None or name.startswith("__"):
            if name.startswith("_"):
                raise AttributeError(name)
            raise FormulaError(
                f".{name} is not elementwise, so it cannot be used in a formula; a formula sees one element at a "
                "time. Compute it before or after the fused function."
            )
        return lambda *args, **kwargs: method(self, *args, **kwargs)

    def __add__(self, other: Any) -> Expr:
        return METHODS["add"](self, other)

    def __radd__(self, other: Any) -> Expr:
        return METHODS["add"](other, self)

    def __sub__(self, other: Any) -> Expr:
        return METHODS["sub"](self, other)

    def __rsub__(self, other: Any) -> Expr:
        return METHODS["sub"](other, self)

    def __mul__(self, other: Any) -> Expr:
        return METHODS["mul"](self, other)

    def __rmul__(self, other: Any) -> Expr:
        return METHODS["mul"](other, self)

    def __truediv__(self, other: Any) -> Expr:
        return METHODS["div"](self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return METHODS["div"](other, self)

    def __floordiv__(self, other: Any) -> Expr:
        return METHODS["floor_divide"](self, other)

    def __rfloordiv__(self, other: Any) -> Expr:
        return METHODS["floor_divide"](other, self)

    def __mod__(self, other: Any) -> Expr:
        return METHODS["remainder"](self, other)

    def __rmod__(self, other: Any) -> Expr:
        return METHODS["remainder"](other, self)

    def __pow__(self, other: Any) -> Expr:
        return METHODS["pow"](self, other)

    def __rpow__(self, other: Any) -> Expr:
        return METHODS["pow"](other, self)

    def __neg__(self) -> Expr:
        return METHODS["neg"](self)

    def __pos__(self) -> Expr:
        return self

    def __abs__(self) -> Expr:
        return METHODS["abs"](self)

    def __invert__(self) -> Expr:
        return METHODS["logical_not"](self)

    def __and__(self, other: Any) -> Expr:
        return METHODS["logical_and"](self, other)

    def __or__(self, other: Any) -> Expr:
        return METHODS["logical_or"](self, other)

    __rand__, __ror__ = __and__, __or__

    def __lt__(self, other: Any) -> Expr:
        return METHODS["lt"](self, other)

    def __le__(self, other: Any) -> Expr:
        return METHODS["le"](self, other)

    def __gt__(self, other: Any) -> Expr:
        return METHODS["gt"](self, other)

    def __ge__(self, other: Any) -> Expr:
        return METHODS["ge"](self, other)

    def __eq__(self, other: object) -> Any:
        return METHODS["eq"](self, other)

    def __ne__(self, other: object) -> Any:
        return METHODS["ne"](self, other)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return to_text(self)


# The symbolic functions by name, for operators and methods; kernels/scalar.py fills it.
METHODS: dict[str, Callable[..., Expr]] = {}
# A simpler expression for a function of given arguments, or None; kernels/simplify.py fills it.
SIMPLIFIERS: dict[str, Callable[..., Expr | None]] = {}

_interned: WeakValueDictionary[tuple, Expr] = WeakValueDictionary()
_interning = threading.RLock()


class Variable(Expr):
    """An input of a formula, known by its name.

    kind: "number"; left out of dtype promotion are "mask" (a condition), "label" (an integer) and "state" (a number
        that the formula gives a new value, in place).
    level: "element"; in row formulas also "row" and "column", for one value a row or column, and "scalar".
    """

    __slots__ = ("name", "kind", "level")

    name: str
    kind: str
    level: str


class Constant(Expr):
    """A literal number in a formula."""

    __slots__ = ("value",)

    value: bool | int | float


_leaf = ScalarFunction("leaf", None, "")


def variable(name: str, kind: str = "number", level: str = "element") -> Variable:
    """The input called `name`; the same object for the same name, kind and level."""
    key = ("variable", name, kind, level)
    with _interning:
        found = _interned.get(key)
        if found is None:
            found = Variable()
            found.function, found.args = _leaf, ()
            found.name, found.kind, found.level = name, kind, level
            _interned[key] = found
        return found  # type: ignore[return-value]


def constant(value: bool | int | float) -> Constant:
    """The literal `value`; 1 and 1.0 and True are different constants, and so are 0.0 and -0.0."""
    key = ("constant", type(value).__name__, repr(value))
    with _interning:
        found = _interned.get(key)
        if found is None:
            found = Constant()
            found.function, found.args, found.value = _leaf, (), value
            _interned[key] = found
        return found  # type: ignore[return-value]


def as_expr(value: Any) -> Expr:
    """A number or an expression as an expression."""
    if isinstance(value, Expr):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return constant(value)
    raise FormulaError(
        f"A formula takes its tensors as arguments; it cannot use a {type(value).__name__} from outside. "
        "Make it an argument of the function."
    )


_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or"}


def apply(function: ScalarFunction, *args: Any) -> Expr:
    """`function` applied to expressions or numbers: simplified, then interned."""
    exprs = tuple(as_expr(a) for a in args)
    simplify = SIMPLIFIERS.get(function.name)
    simpler = None if simplify is None else simplify(*exprs)
    return intern(function, exprs) if simpler is None else simpler


def intern(function: ScalarFunction, args: tuple[Expr, ...]) -> Expr:
    """The one node for `function` of `args`; a commutative function forgets the order of its arguments."""
    ids = [id(a) for a in args]
    if function.name in _COMMUTATIVE:
        ids.sort()
    key = (function.name, *ids)
    with _interning:
        found = _interned.get(key)
        if found is None:
            found = Expr()
            found.function, found.args = function, args
            _interned[key] = found
        return found


def topological(roots: Iterable[Expr], known: Container[Expr] = ()) -> list[Expr]:
    """Every node that the roots need and that is not `known`, arguments before their users, each once; no recursion."""
    order: list[Expr] = []
    seen: set[Expr] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen and node not in known:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args) if a not in seen)
    return order


def variables(roots: Iterable[Expr]) -> list[Variable]:
    """The variables that the roots depend on, in order of first use."""
    return [node for node in topological(roots) if isinstance(node, Variable)]


def substitute(roots: Sequence[Expr], replacement: dict[Expr, Expr]) -> list[Expr]:
    """The roots with every occurrence of a key replaced by its value."""
    done: dict[Expr, Expr] = dict(replacement)
    stack = [(root, False) for root in roots]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if not node.args:
            done[node] = node
        elif ready:
            done[node] = apply(node.function, *(done[a] for a in node.args))
        else:
            stack.append((node, True))
            stack.extend((a, False) for a in node.args)
    return [done[root] for root in roots]


_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
          "ne": "!=", "pow": "**", "logical_and": "&", "logical_or": "|"}  # fmt: skip


def to_text(root: Expr, limit: int = 2000) -> str:
    """The expression as a person would write it; cut at `limit` characters."""

    def text(node: Expr, depth: int) -> str:
        if isinstance(node, Variable):
            return node.name
        if isinstance(node, Constant):
            return f"{node.value:g}" if isinstance(node.value, float) and math.isfinite(node.value) else str(node.value)
        if depth > 40:
            return "…"
        parts = [text(a, depth + 1) for a in node.args]
        if node.function.name in _INFIX:
            return f"({parts[0]} {_INFIX[node.function.name]} {parts[1]})"
        if node.function.name == "neg":
            return f"-{parts[0]}"
        return f"{node.function.name}({', '.join(map(_bare, parts))})"

    written = _bare(text(root, 0))
    return written if len(written) <= limit else written[:limit] + "…"


def _bare(written: str) -> str:
    """Without the pair of parentheses around the whole."""
    return written[1:-1] if written.startswith("(") and written.endswith(")") and _outer_pair(written) else written


def _outer_pair(written: str) -> bool:
    depth = 0
    for i, letter in enumerate(written):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return i == len(written) - 1
    return False
