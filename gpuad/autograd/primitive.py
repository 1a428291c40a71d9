"""Operations that are not elementwise: a forward function on arrays, and rules that name what they need.

    matmul = primitive(
        "matmul",
        lambda backend, a, b: backend.gemm(a, b),
        vjp={"a": lambda g, b: matmul(g, mT(b)), "b": lambda g, a: matmul(mT(a), g)},
        jvp=multilinear,
    )

The parameters of `forward` after `backend` are the inputs; keyword-only ones are parameters that are no tensors. A rule
asks for what it needs by its parameter names: `g`, an input (which is then saved), `out` (the output, saved),
`<input>_shape`, `<input>_dtype`, or a parameter of the op. Nothing else is kept alive. A rule with a parameter `into`
gets (buffer, beta) when the gradient may be written straight into a leaf's buffer, else None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import numpy as np

from gpuad.array.device import of_array
from gpuad.array.dtypes import FLOATING
from gpuad.autograd.batching import Batch, Rule, without_rule
from gpuad.autograd.modes import state
from gpuad.autograd.node import WRITTEN, Node
from gpuad.autograd.op import NUMBERS, Interpreters, Op, as_operand, check_devices
from gpuad.autograd.views import prune
from gpuad.errors import FormulaError
from gpuad.kernels.expr import Expr
from gpuad.tensor import Tensor, wrap

linear = "linear"  # jvp of an op that is linear in all of its inputs together
multilinear = "multilinear"  # jvp of an op that is linear in each of its inputs


class _Rule:
    """A derivative rule and what it asks for."""

    __slots__ = ("function", "names", "into", "joint")

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.names = tuple(inspect.signature(function).parameters)
        self.into = "into" in self.names


class _Plan:
    """What a backward pass for some wanted inputs needs: prepared once.

    inputs, output: what is saved, called `names` by the rules. metadata: (name, input, attribute) for shapes and
    dtypes. run: (g, saved, known, parents, walk) -> a list with the gradient of each wanted input, None for the others.
    """

    __slots__ = ("inputs", "output", "names", "metadata", "run")

    run: Callable[..., list[Any]]

    def __init__(self, op: Primitive, wanted: tuple[int, ...]) -> None:
        rules = [(i, op.rules[op.names[i]]) for i in wanted if op.names[i] in op.rules]
        asked = {name for _, rule in rules for name in rule.names}
        self.inputs = tuple(i for i, n in enumerate(op.names) if n in asked)
        self.output = "out" in asked
        self.names = [op.names[i] for i in self.inputs] + ["out"] * self.output
        self.metadata = [
            (f"{n}_{attribute}", i, attribute)
            for i, n in enumerate(op.names)
            for attribute in ("shape", "dtype")
            if f"{n}_{attribute}" in asked
        ]
        if not op.variadic:
            self.run = self._write(op, rules)

    def _write(self, op: Primitive, rules: Sequence[tuple[int, _Rule]]) -> Callable[..., list[Any]]:
        """The rules of the wanted inputs as one straight-line function: no look-ups by name in the walk."""
        namespace: dict[str, Any] = {"WRITTEN": WRITTEN, "Tensor": Tensor}
        lines = ["def run(g, saved, known, parents, walk):"]
        results = ["None"] * len(op.names)
        for i, rule in rules:
            namespace[f"rule{i}"] = rule.function
            arguments = []
            for name in rule.names:
                if name in self.names:
                    arguments.append(f"saved[{self.names.index(name)}]")
                else:
                    arguments.append({"g": "g", "into": f"into{i}"}.get(name, f"known[{name!r}]"))
            if rule.into:
                lines.append(f"into{i} = walk.into(parents[{i}]) if isinstance(parents[{i}], Tensor) else None")
            lines.append(f"r{i} = rule{i}({', '.join(arguments)})")
            if rule.into:
                lines.append(f"if into{i} is not None: r{i} = WRITTEN")
            results[i] = f"r{i}"
        lines.append(f"return [{', '.join(results)}]")
        exec(compile("\n    ".join(lines), f"<gradient of {op.name}>", "exec"), namespace)
        return namespace["run"]


_new = object.__new__

# What a bare array is not: quicker to ask than what it is, as CuPy may not be there.
_NO_ARRAYS = (Tensor, Expr, list, tuple, np.generic, type(None), *NUMBERS)


class Primitive(Op):
    """An operation declared by its forward function and its rules; see the top of this file.

    view: the output shares the memory of input 0 (on every device), and with it the version.
    outputs: how many outputs; of several only the first `differentiable` take part in differentiation.
    moves: the output lies on the device in the parameter `device`.
    variadic: the inputs are one sequence of any length; the only rule, "inputs", returns a list.
    batch: how vmap applies it to many examples at once, see batching.py; `shift` suits most.
    """

    def __init__(
        self,
        name: str,
        forward: Callable,
        vjp: dict[str, Callable] | None = None,
        jvp: Any = None,
        samples: Sequence[Any] = (),
        doc: str = "",
        view: bool = False,
        outputs: int = 1,
        variadic: bool = False,
        moves: bool = False,
        register: bool = True,
        autocast: str | None = None,
        batch: Rule = without_rule,
    ) -> None:
        super().__init__(name, doc, samples, register, autocast)
        self.forward, self.batch_rule = forward, batch
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        self.names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        self.view, self.outputs, self.variadic, self.moves = view, outputs, variadic, moves
        self.rules = {k: _Rule(f) for k, f in (vjp or {}).items()}
        self.jvp = {k: _Rule(f) for k, f in jvp.items()} if isinstance(jvp, dict) else jvp
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def plan(self, wanted: tuple[int, ...]) -> _Plan:
        """What the rules of the wanted inputs read, prepared once."""
        found = self._plans.get(wanted)
        if found is None:
            found = self._plans[wanted] = _Plan(self, wanted)
        return found

    # Forward ----------------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any, **params: Any) -> Any:
        first = inputs[0]
        if not isinstance(first, _NO_ARRAYS) and not any([isinstance(x, Tensor) for x in inputs]):
            return self.forward(of_array(first).backend, *inputs, **params)
        arrays = []
        device = None
        wanted: tuple[int, ...] = ()
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor):
                arrays.append(x._data)
                if device is None:
                    device = x._device
                elif x._device is not device:
                    check_devices(self.name, inputs, None if self.variadic else self.names)
                if x._requires_grad:
                    wanted = (*wanted, i)
            elif x is None or isinstance(x, NUMBERS):
                arrays.append(x)
            elif isinstance(x, Expr):
                raise FormulaError(
                    f"{self.name} is not elementwise, so it cannot be used in a formula; a formula sees one element at "
                    "a time. Compute it before or after the fused function."
                )
            else:
                arrays.append(as_operand(self.name, x))
        if Interpreters.active:
            result = Interpreters.apply(self, inputs, params)
            if result is not NotImplemented:
                return result
        if device is None:
            raise TypeError(f"{self.name} needs at least one Tensor.")
        backend = device.backend
        try:
            if backend.current:
                data = self.forward(backend, *arrays, **params)
            else:
                data = backend.inside(self.forward, backend, *arrays, **params)
        except (MemoryError, RuntimeError) as error:
            backend.explain(error)
            raise
        if self.moves:
            device = params["device"]
        if self.outputs > 1:
            outs = tuple([wrap(d, device) for d in data])
            out = outs[0]
        else:
            outs = out = _new(Tensor)  # type: ignore[assignment]
            out._data, out._device, out._requires_grad, out._node, out._grad = data, device, False, None, None
            if self.view:
                source = inputs[0]
                cell = out._cell = source._cell
                if not state.enabled:
                    out._view = (None, source, "no_grad")
                else:
                    out._view = (self, source, params)
                    if source._node is not None or not source._requires_grad:  # others cannot be changed in place
                        cell.append(ref(out))
                        if len(cell) > 64:
                            prune(cell)
            else:
                out._cell, out._view = [0], None
        if wanted and state.enabled and self.rules and out._data.dtype.char in FLOATING:
            self._record(inputs, arrays, out, wanted, params)
        return outs

    def _record(
        self, inputs: Sequence[Any], arrays: Sequence[Any], out: Tensor, wanted: tuple[int, ...], params: dict
    ) -> None:
        plan = self.plan(() if self.variadic else wanted)
        saved = []
        cells = []
        version = 0
        for i in plan.inputs:
            saved.append(arrays[i])
            if isinstance(inputs[i], Tensor):
                cell = inputs[i]._cell
                cells.append(cell)
                version += cell[0]
        if plan.output:
            saved.append(out._data)
            cells.append(out._cell)
            version += out._cell[0]
        parents: list[Any] = [None] * len(inputs)
        for i in wanted:
            x = inputs[i]
            parents[i] = x if x._node is None else x._node
        if self.variadic:
            known = {**params, "shapes": [a.shape for a in arrays], "wanted": [p is not None for p in parents]}
        elif plan.metadata:
            known = dict(params)
            for name, i, attribute in plan.metadata:
                known[name] = getattr(arrays[i], attribute, None)
        else:
            known = params
        out._node = Node(self, tuple(parents), tuple(saved), tuple(cells), version, (plan, known), out._device)
        out._requires_grad = True

    # Reverse mode -----------------------------------------------------------------------------------------------------

    def backward(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        plan, known = node.info
        if self.variadic:
            return self._run_variadic(gradient, known)
        return plan.run(gradient, node.check(), known, node.parents, walk)

    def backward_recorded(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        plan, known = node.info
        if self.variadic:
            return self._run_variadic(gradient, known)
        arrays = node.check()
        saved = [node.saved_tensor(a, node.parents[i]) for a, i in zip(arrays, plan.inputs, strict=False)]
        if plan.output:
            saved.append(node.saved_tensor(arrays[-1], node))
        return plan.run(gradient, saved, known, node.parents, walk)

    def _run_variadic(self, gradient: Any, known: dict[str, Any]) -> list[Any]:
        rule = self.rules["inputs"]
        values = {"g": gradient, **known}
        return list(rule.function(*[values[n] for n in rule.names]))

    # Forward mode -----------------------------------------------------------------------------------------------------

    def tangent(self, inputs: Sequence[Any], tangents: Sequence[Any], params: dict) -> tuple[Any, Any]:
        out = self(*inputs, **params)
        first = out[0] if self.outputs > 1 else out
        total = None
        if self.jvp == linear:
            moving = [
                t if t is not None or not isinstance(x, Tensor) else x.new_zeros(x.shape)
                for x, t in zip(inputs, tangents, strict=True)
            ]
            total = self(*moving, **params)
        elif self.jvp == multilinear:
            for i, t in enumerate(tangents):
                if t is not None:
                    term = self(*inputs[:i], t, *inputs[i + 1 :], **params)
                    total = term if total is None else total + term
        elif isinstance(self.jvp, dict):
            values = {**params, "out": first, "outputs": out}
            for name, x in zip(self.names, inputs, strict=False):
                values[name] = x
                if isinstance(x, Tensor):
                    values[f"{name}_shape"] = tuple(x._data.shape)
            for i, t in enumerate(tangents):
                rule = self.jvp.get(self.names[i])
                if t is not None and rule is not None:
                    values["t"] = t
                    term = rule.function(*[values[n] for n in rule.names])
                    total = term if total is None else total + term
        elif first._data.dtype.char in FLOATING and self.rules:
            raise NotImplementedError(f"{self.name} has no forward-mode rule; its jvp is not declared.")
        return (out, [total, *[None] * (self.outputs - 1)]) if self.outputs > 1 else (out, total)

    def batch(self, batch: Batch, inputs: Sequence[Any], params: dict) -> Any:
        return self.batch_rule(batch, self, inputs, params)


primitive = Primitive
