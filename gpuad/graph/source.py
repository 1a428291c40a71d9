"""Where in the user's program an operation was called: the line, the very expression, the modules, the names."""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import FrameType
from typing import Any, NamedTuple

from gpuad.tensor import Tensor


class Place(NamedTuple):
    """A place in the user's program: file and line, the line's text, the expression there (Python 3.11 or later).

    assigned: the variable that the expression is the whole value of, "" where there is none.
    """

    file: str = ""
    line: int = 0
    text: str = ""
    expression: str = ""
    assigned: str = ""


# Python 3.11 knows the columns of a call, so that its very expression can be shown and named.
_EXACT = sys.version_info >= (3, 11)


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__")
    return name is None or name == "gpuad" or name.startswith("gpuad.")


def frames(start: FrameType | None, stop: FrameType | None) -> Iterator[FrameType]:
    """The frames from `start` outwards, up to and without `stop`."""
    while start is not None and start is not stop:
        yield start
        start = start.f_back


def place_of(stack: Iterable[FrameType]) -> tuple[Place, Any]:
    """The innermost place outside gpuad in a stack (innermost first), and a key for the call that was made there.

    Where the stack has none, as for a model of gpuad's own layers: the line in the innermost layer's forward.
    """
    layer = call = None
    for frame in stack:
        if not _is_ours(frame):
            return _place(frame), call if _EXACT else (frame, frame.f_lineno)
        if layer is None and frame.f_code.co_name == "forward":
            layer = frame
        call = frame
    return (Place() if layer is None else _place(layer)._replace(assigned="")), None


def _place(frame: FrameType) -> Place:
    code, file = frame.f_code, frame.f_code.co_filename
    lines = linecache.getlines(file, frame.f_globals)
    line = frame.f_lineno
    text = lines[line - 1] if 0 < line <= len(lines) else ""
    expression, assigned = "", "" if _EXACT else _assigned(text, None)
    if _EXACT and text:
        first, last, start, stop = next(islice(code.co_positions(), frame.f_lasti // 2, None))
        if first is not None and first == last == line and start is not None:
            expression = text.encode()[start:stop].decode(errors="replace")
            assigned = _assigned(text, expression)
    return Place(file, line, text.strip(), expression, assigned)


def _assigned(text: str, expression: str | None) -> str:
    """The name that a one-line statement gives to the expression (None: to its value), "" where it gives none."""
    try:
        statement = ast.parse(text.strip()).body[0]
    except (SyntaxError, IndexError):  # part of a statement of several lines, or a block's header
        return ""
    value = getattr(statement, "value", None)
    if value is None:
        return ""
    if expression is not None and ast.get_source_segment(text.strip(), value) not in (expression, f"({expression})"):
        return ""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else ""
    return ""


def parameter_names(function: Callable, count: int) -> list[str]:
    """Names for `count` inputs of a function: those of its parameters as far as it says them."""
    try:
        known = [p.name for p in inspect.signature(getattr(function, "forward", function)).parameters.values()
                 if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]  # fmt: skip
    except (TypeError, ValueError):  # a builtin without a signature
        known = []
    return [*known[:count], *(f"x{i}" for i in range(len(known), count))]


def _is_module(x: Any) -> bool:
    return hasattr(type(x), "named_modules") and hasattr(type(x), "named_parameters")


class Names:
    """The names of tensors and modules, as the program has them."""

    def __init__(self, root: Any = None) -> None:
        self._tensors: dict[int, tuple[str, str]] = {}
        self._modules: dict[int, str] = {}
        self._kept: list[Any] = []  # what is known by its id stays alive, so that the id stays taken
        if _is_module(root):
            self.add_module(root, "")

    def add_tensor(self, tensor: Tensor, name: str, kind: str) -> None:
        """Call a tensor by a name."""
        self._tensors.setdefault(id(tensor), (name, kind))
        self._kept.append(tensor)

    def add_module(self, module: Any, prefix: str) -> None:
        """Call a module's parts by their dotted names behind a prefix."""
        if id(module) in self._modules:
            return
        self._kept.append(module)

        def full(name: str) -> str:
            return f"{prefix}.{name}" if prefix and name else prefix or name

        for name, part in module.named_modules():
            self._modules.setdefault(id(part), full(name))
        for name, parameter in module.named_parameters():
            self.add_tensor(parameter, full(name), "parameter")
        for name, buffer in module.named_buffers():
            self.add_tensor(buffer, full(name), "constant")

    def module_of(self, stack: list[FrameType]) -> tuple[str, str]:
        """(dotted name, class name) of the innermost module whose method is on the stack; of none ("", "")."""
        found: list[tuple[Any, int]] = []  # innermost first, with where it is on the stack
        for i, frame in enumerate(stack):
            if frame.f_code.co_varnames[:1] == ("self",):
                module = frame.f_locals.get("self")
                if _is_module(module):
                    found.append((module, i))
        if not found:
            return "", ""
        module, (root, at) = found[0][0], found[-1]
        if id(root) not in self._modules:
            outside = (frame for frame in stack[at + 1 :] if not _is_ours(frame))
            self.add_module(root, next((n for f in outside if (n := variable_of(f, root))), type(root).__name__))
        return self._modules.get(id(module), ""), type(module).__name__

    def of_leaf(self, tensor: Tensor, stack: Iterable[FrameType]) -> tuple[str, str]:
        """(name, kind) of a tensor that no operation computed; the name is "" where the program has none."""
        known = self._tensors.get(id(tensor))
        if known is None:
            kind = "input" if tensor._requires_grad else "constant"
            name = tensor.name or ""
            for frame in stack:
                if name:
                    break
                if not _is_ours(frame):
                    name = variable_of(frame, tensor)
            known = (name, kind)
            self.add_tensor(tensor, *known)
        return known

    def add_modules_of(self, frame: FrameType) -> None:
        """The modules among the variables of a frame; the names of a single one have no prefix."""
        modules = {n: v for n, v in frame.f_locals.items() if _is_module(v) and not n.startswith("_")}
        for name, module in modules.items():
            self.add_module(module, "" if len(modules) == 1 else name)


def variable_of(frame: FrameType, value: Any) -> str:
    """The variable of a frame (or of its module) that is `value`, "" where there is none."""
    for scope in (frame.f_locals, frame.f_globals):
        for name, each in scope.items():
            if each is value and not name.startswith("_"):
                return name
    return ""
