"""Elementwise operations: declared by a formula; value, vjp, jvp and their derivatives are derived from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuad.array import dtypes
from gpuad.array.device import Device, default_device, of_array
from gpuad.array.dtypes import FLOATING
from gpuad.autograd import batching
from gpuad.autograd.formula_gradients import Plan
from gpuad.autograd.levels import batches_of
from gpuad.autograd.modes import state
from gpuad.autograd.node import Node, OutputNode
from gpuad.autograd.op import (
    NUMBERS,
    Interpreters,
    Op,
    as_operand,
    broadcast_error,
    check_devices,
    check_in_place,
    function,
    promoted_dtype,
    writable,
)
from gpuad.autograd.views import moved
from gpuad.errors import DtypeError, FormulaError
from gpuad.kernels.expr import Expr, as_expr, substitute
from gpuad.kernels.formula import Formula, trace
from gpuad.tensor import Tensor, wrap

_new = object.__new__


class Elementwise(Op):
    """An operation on corresponding elements, derived from its formula.

    Operands broadcast and are promoted as in PyTorch; they are Tensors of one device, or numbers. A formula with
    several outputs returns a tuple of Tensors.

    hidden: how many of the last outputs are not returned, only kept for the derivative.
    """

    operator = ""
    has_in_place = False
    keeps_output = True  # whether the derivative may be written in terms of the output

    def __init__(
        self,
        name: str,
        formula: Formula | Callable,
        samples: Sequence[Any] = (),
        doc: str = "",
        register: bool = True,
        labels: Sequence[str] = (),
        hidden: int = 0,
        autocast: str | None = None,
    ) -> None:
        super().__init__(name, doc, samples, register, autocast)
        self.defaults: dict[str, Any] = {}
        if not isinstance(formula, Formula):
            parameters = inspect.signature(formula).parameters.values()
            self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            formula = trace(formula, name, labels=labels)
        self.formula = formula
        self.arity = len(formula.inputs)
        self.names = [v.name for v in formula.inputs]
        self.visible = len(formula.outputs) - hidden
        self.several = self.visible > 1
        self.differentiable = not all(formula.bool_outputs)
        self._plans: dict[Any, Any] = {}
        self._tangent_ops: dict[tuple[Any, ...], Elementwise] = {}
        masks = [i for i, v in enumerate(formula.inputs) if v.kind != "number"]
        # The quick way is for one or two float Tensors of one device, dtype and shape.
        self._quick = not masks and len(formula.outputs) == 1 and self.arity <= 2
        signature = [f"{n}={self.defaults[n]!r}" if n in self.defaults else n for n in self.names]
        self.signature = f"{name}({', '.join(signature)})"

    def plan(self, wanted: tuple[int, ...]) -> Plan:
        """The prepared backward pass for gradients of the `wanted` inputs."""
        found = self._plans.get(wanted)
        if found is None:
            found = self._plans[wanted] = Plan(self, wanted)
        return found

    # Forward ----------------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self._quick and not named and not Interpreters.active and len(inputs) == self.arity:
            x = inputs[0]
            if isinstance(x, Tensor):
                data = x._data
                if self.arity == 1:
                    if data.dtype.char in FLOATING:
                        return self._unary(x, data)
                else:
                    y = inputs[1]
                    if type(y) is float or type(y) is int:
                        if data.dtype.char in FLOATING:
                            return self._unary(x, data, y)
                    elif isinstance(y, Tensor) and y._device is x._device:
                        other = y._data
                        if other.dtype is data.dtype and data.dtype.char in FLOATING and other.shape == data.shape:
                            return self._binary(x, y, data, other)
        if named or len(inputs) != self.arity:
            # PyTorch's activations take `inplace` as their last parameter.
            if len(inputs) == self.arity + 1 and isinstance(inputs[-1], bool):
                named["inplace"] = inputs[-1]
                inputs = inputs[:-1]
            if named.pop("inplace", False):
                return self.in_place(*inputs, **named)
            inputs = self._bind(inputs, named)
        return self._general(inputs, {})

    def _unary(self, x: Tensor, *arguments: Any) -> Tensor:
        """One Tensor, and perhaps a number as the second operand."""
        device = x._device
        dtype = arguments[0].dtype
        array = device.backend.elementwise(self.formula, arguments, dtype)
        out = _new(Tensor)
        out._data, out._device, out._node, out._grad, out._view = array, device, None, None, None
        cell = out._cell = [0]
        if x._requires_grad and state.enabled and self.differentiable:
            plan = self._plans.get(_FIRST) or self.plan(_FIRST)
            saved: tuple[Any, ...] = ()
            cells: tuple[list[int], ...] = ()
            version = 0
            if plan.inputs:
                saved = tuple([arguments[i] for i in plan.inputs])
                if plan.inputs[0] == 0:
                    cells = (x._cell,)
                    version = x._cell[0]
            if plan.outputs:
                saved, cells = (*saved, array), (*cells, cell)
            node = x._node
            parents = (x if node is None else node,) if self.arity == 1 else (x if node is None else node, None)
            out._node = Node(self, parents, saved, cells, version, (plan, None), device)
            out._requires_grad = True
        else:
            out._requires_grad = False
        return out

    def _binary(self, x: Tensor, y: Tensor, a: Any, b: Any) -> Tensor:
        """Two Tensors of one device, dtype and shape."""
        device = x._device
        array = device.backend.elementwise(self.formula, (a, b), a.dtype)
        out = _new(Tensor)
        out._data, out._device, out._node, out._grad, out._view = array, device, None, None, None
        cell = out._cell = [0]
        out._requires_grad = False
        if (x._requires_grad or y._requires_grad) and state.enabled and self.differentiable:
            wanted = _BOTH if x._requires_grad and y._requires_grad else _FIRST if x._requires_grad else _SECOND
            plan = self._plans.get(wanted) or self.plan(wanted)
            saved: tuple[Any, ...] = ()
            cells: tuple[list[int], ...] = ()
            version = 0
            if plan.inputs:
                arguments, owners = (a, b), (x._cell, y._cell)
                saved = tuple([arguments[i] for i in plan.inputs])
                cells = tuple([owners[i] for i in plan.inputs])
                version = sum([c[0] for c in cells])
            if plan.outputs:
                saved, cells = (*saved, array), (*cells, cell)
            parents = (
                (x if x._node is None else x._node) if x._requires_grad else None,
                (y if y._node is None else y._node) if y._requires_grad else None,
            )
            out._node = Node(self, parents, saved, cells, version, (plan, None), device)
            out._requires_grad = True
        return out

    def _bind(self, inputs: Sequence[Any], named: dict[str, Any]) -> tuple[Any, ...]:
        """The inputs in order, names and defaults filled in."""
        if len(inputs) > self.arity:
            raise TypeError(f"{self.signature} takes {self.arity} operands, got {len(inputs)}.")
        bound = list(inputs)
        named = dict(named)
        for name in self.names[len(bound) :]:
            if name in named:
                bound.append(named.pop(name))
            elif name in self.defaults:
                bound.append(self.defaults[name])
            else:
                raise TypeError(f"{self.signature} needs {name!r}.")
        if named:
            raise TypeError(f"{self.signature} has no parameter {next(iter(named))!r}.")
        return tuple(bound)

    def _general(self, inputs: Sequence[Any], params: dict) -> Any:
        """Any operands: bare arrays, numbers, mixed dtypes, broadcasting, symbols, dual numbers.

        params: what besides operands says what is computed; the axes of row operations.
        """
        tensors = bare = False
        for x in inputs:
            if isinstance(x, Tensor):
                tensors = True
            elif isinstance(x, Expr):
                return self.inline(inputs)
            elif not isinstance(x, NUMBERS) or isinstance(x, np.generic):
                bare = True
        if not tensors:
            if bare and not any(isinstance(x, (list, tuple, np.generic, str)) for x in inputs):
                return self._on_arrays(inputs, params)
            inputs = [as_operand(self.name, x) for x in inputs]
            if self.arity == 1 or not any(isinstance(x, Tensor) for x in inputs):
                inputs = [wrap(_number_array(inputs[0])), *inputs[1:]]
        elif bare:
            inputs = [as_operand(self.name, x) for x in inputs]
        if Interpreters.active:
            result = Interpreters.apply(self, inputs, params)
            if result is not NotImplemented:
                return result
        device = check_devices(self.name, inputs, self.names)
        arrays = [x._data if isinstance(x, Tensor) else x for x in inputs]
        results, dtype = self._compute(device, inputs, arrays, **params)
        outs = [wrap(r, device) for r in results[: self.visible]]
        if state.enabled and self.differentiable and any([isinstance(x, Tensor) and x._requires_grad for x in inputs]):
            self._record(inputs, arrays, outs, dtype, device, results, **params)
        return tuple(outs) if self.several else outs[0]

    def _compute(self, device: Device, inputs: Sequence[Any], arrays: Sequence[Any]) -> tuple[list, Any]:
        formula = self.formula
        dtype = promoted_dtype([arrays[i] for i in formula.promoted], formula.needs_float)
        if dtype.kind == "b" and formula.refuses_bools:
            raise DtypeError(
                f"{self.name} takes numbers, not bools; convert first, e.g. x.int(), or use logical_not(x)."
            )
        try:
            results = device.backend.elementwise_mixed(formula, arrays, dtype)
        except ValueError as error:
            shapes = [tuple(a.shape) for a in arrays if not isinstance(a, NUMBERS)]
            if _broadcasts(shapes):
                raise
            raise broadcast_error(self.name, inputs, self.names) from error
        return (results if len(formula.outputs) > 1 else [results]), dtype

    def _on_arrays(self, inputs: Sequence[Any], params: dict) -> Any:
        """Bare arrays in, bare arrays out: how rules run in a plain backward pass."""
        first = next(x for x in inputs if not isinstance(x, NUMBERS))
        results, _ = self._compute(of_array(first), inputs, inputs, **params)
        return tuple(results[: self.visible]) if self.several else results[0]

    def inline(self, inputs: Sequence[Any]) -> Any:
        """The formula applied to symbolic scalars: an op used inside another formula."""
        swap: dict[Expr, Expr] = {}
        for variable, value in zip(self.formula.inputs, inputs, strict=True):
            swap[variable] = as_expr(value)
        results = substitute(self.formula.outputs, swap)
        return tuple(results) if self.several else results[0]

    # Recording --------------------------------------------------------------------------------------------------------

    def _record(
        self,
        inputs: Sequence[Any],
        arrays: Sequence[Any],
        outs: Sequence[Tensor],
        dtype: np.dtype,
        device: Device,
        results: Sequence[Any],
        **params: Any,
    ) -> None:
        wanted = tuple([i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x._requires_grad])
        plan = self.plan(wanted)
        saved = [arrays[i] for i in plan.inputs] + [results[i] for i in plan.outputs]
        cells = [inputs[i]._cell for i in plan.inputs if isinstance(inputs[i], Tensor)]
        cells += [outs[i]._cell for i in plan.visible_outputs]
        parents = [None] * self.arity
        for i in wanted:
            x = inputs[i]
            parents[i] = x if x._node is None else x._node
        layout: Any = tuple(
            [(x._data.shape, x._data.dtype) if isinstance(x, Tensor) and i in wanted else None
             for i, x in enumerate(inputs)]
        )  # fmt: skip
        if self._alike(layout, plan, arrays, outs[0]._data, device):
            layout = None
        shapes = [(o._data.shape, o._data.dtype) for o in outs] if self.several else None
        info = (plan, layout, shapes, *params.values())
        version = sum([c[0] for c in cells])
        node = Node(self, tuple(parents), tuple(saved), tuple(cells), version, info, device)
        for i, out in enumerate(outs):
            if self.formula.bool_outputs[i]:
                continue
            out._node = OutputNode(node, i) if self.several else node
            out._requires_grad = True

    def _alike(self, layout: Any, plan: Any, arrays: Sequence[Any], out: Any, device: Device) -> bool:
        """Whether gradients need neither be summed to the shapes of their operands nor cast to their dtypes."""
        return all([e is None or e == (out.shape, out.dtype) for e in layout]) and all(
            [not isinstance(arrays[i], device.backend.array_type) or arrays[i].dtype == out.dtype for i in plan.inputs]
        )

    # Reverse mode -----------------------------------------------------------------------------------------------------

    def backward(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        plan, layout = node.info[0], node.info[1]
        saved: Any = node.check() if plan.formula is not None else node.saved
        backend = node.device.backend
        if layout is None and not self.several:
            if plan.formula is None:
                return [None if p is None else gradient for p in node.parents]
            result = backend.elementwise(plan.formula, (gradient, *saved), gradient.dtype)
            if self.arity == 1:
                return [result]
            results = iter((result,) if len(plan.computed) == 1 else result)
            return [
                None if p is None else gradient if i in plan.passed else next(results)
                for i, p in enumerate(node.parents)
            ]
        gradients = self._fill(node, gradient, backend) if self.several else (gradient,)
        return plan.broadcast(node, gradients, layout, saved, walk)

    def _fill(self, node: Node, gradients: Sequence[Any], backend: Any) -> tuple[Any, ...]:
        """Zeros for outputs that got no gradient."""
        return tuple(
            backend.full(shape, 0, dtype if dtype.char in FLOATING else np.dtype(np.float32)) if g is None else g
            for g, (shape, dtype) in zip(gradients, node.info[2], strict=True)
        )

    def derived(self, name: str, formula: Formula) -> Elementwise:
        """An operation of a formula derived from this one's."""
        return Elementwise(name, formula, register=False)

    def _params(self, node: Node) -> dict:
        """What a node's operation was called with besides operands."""
        return {}

    def backward_recorded(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        plan, layout = node.info[0], node.info[1]
        saved = node.check()
        arguments = [node.saved_tensor(s, node.parents[i]) for s, i in zip(saved, plan.inputs, strict=False)]
        for s, i in zip(saved[len(plan.inputs) :], plan.outputs, strict=True):
            out = wrap(s, node.device)
            if i < self.visible:
                out._node, out._requires_grad = (OutputNode(node, i) if self.several else node), True
            arguments.append(out)
        gradients: Sequence[Any] = (gradient,)
        if self.several:
            backend = node.device.backend
            gradients = [
                wrap(z, node.device) if g is None else g
                for g, z in zip(gradient, self._fill(node, gradient_arrays(gradient), backend), strict=True)
            ]
        values: dict[int, Any] = dict.fromkeys(plan.passed, gradients[0])
        if plan.computed:
            if plan.recorded_op is None:
                plan.recorded_op = self.derived(plan.recorded.name, plan.recorded)
            computed = plan.recorded_op(*gradients, *arguments, **self._params(node))
            values.update(zip(plan.computed, computed if plan.recorded_op.several else [computed], strict=True))
        result: list[Any] = [None] * self.arity
        for i in plan.wanted:
            value = values[i]
            if layout is not None:
                shape, dtype = layout[i]
                if value._data.shape != shape:
                    value = value.sum_to_size(shape)
                if value._data.dtype != dtype:
                    value = value.to(dtype)
            result[i] = value
        return result

    # Forward mode -----------------------------------------------------------------------------------------------------

    def tangent(self, inputs: Sequence[Any], tangents: Sequence[Any], params: dict) -> tuple[Any, Any]:
        moving = tuple([i for i, t in enumerate(tangents) if t is not None])
        given = [t for t in tangents if t is not None]
        count = self.visible
        # Many tangents of one value (jacfwd): the value is computed once, not for each of them.
        apart = not batches_of(given) <= batches_of(inputs)
        key = (apart, *moving)
        op = self._tangent_ops.get(key)
        if op is None:
            formula: Any = self.formula.jvp(moving).formula
            if apart:
                first = len(self.formula.outputs)
                formula = formula.of(formula.outputs[first:][:count], formula.levels[first:][:count])
            op = self._tangent_ops[key] = self.derived(f"{self.name}_jvp", formula)
        results = op(*inputs, *given, **params)
        if apart:
            value, results = self(*inputs, **params), results if op.several else (results,)
            values, derivatives = value if self.several else (value,), list(results)
        else:
            values, derivatives = results[:count], list(results[len(self.formula.outputs) :][:count])
        for i, is_bool in enumerate(self.formula.bool_outputs[:count]):
            if is_bool:
                derivatives[i] = None
        return (values, derivatives) if self.several else (values[0], derivatives[0])

    def batch(self, batch: batching.Batch, inputs: Sequence[Any], params: dict) -> Any:
        return batching.elementwise(batch, self, inputs, params)

    # In place ---------------------------------------------------------------------------------------------------------

    def in_place(self, target: Tensor, *others: Any, **named: Any) -> Tensor:
        """target ← op(target, *others), recorded; the tensor's version grows."""
        inputs: Sequence[Any] = self._bind((target, *others), named)
        inputs = [as_operand(self.name, x) for x in inputs]
        if self.several:
            raise FormulaError(f"{self.name} has several outputs; it has no in-place form.")
        if Interpreters.active:
            result = Interpreters.dual(self, inputs, {})
            if result is not NotImplemented:
                return Interpreters.write(self.name, target, result)
        device = check_devices(self.name, inputs, self.names)
        arrays = [x._data if isinstance(x, Tensor) else x for x in inputs]
        formula = self.formula
        dtype = promoted_dtype([arrays[i] for i in formula.promoted], formula.needs_float)
        shapes = [x._data.shape for x in inputs if isinstance(x, Tensor)]
        recording = state.enabled and any([isinstance(x, Tensor) and x._requires_grad for x in inputs])
        try:
            shape = np.broadcast_shapes(*shapes)
        except ValueError as error:
            raise broadcast_error(self.name, inputs, self.names) from error
        check_in_place(self.name, target, formula.out_dtype(0, dtype), shape, recording)
        data = writable(self.name, target)
        recording = recording and self.differentiable
        wanted = tuple([i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x._requires_grad])
        needed = self.plan(wanted).inputs if recording else ()
        recorded, kept = list(inputs), list(arrays)  # the operands as they were: their nodes, their values
        for i, x in enumerate(inputs):
            if not isinstance(x, Tensor) or x._cell is not target._cell:
                continue
            if x._data is not data or i in needed:
                kept[i] = device.backend.copy(x._data)
            if x._data is not data:  # another view of the same memory must be read before it is written
                arrays[i] = kept[i]
            if x._node is not None or not x._requires_grad:
                was = wrap(kept[i], device)
                was._node, was._requires_grad = x._node, x._requires_grad
                recorded[i] = was
        device.backend.elementwise_mixed(formula, arrays, dtype, [data])
        target._cell[0] += 1
        if recording:
            self._record(recorded, kept, [target], dtype, device, [data])
            moved(target)
        return target


def gradient_arrays(gradients: Sequence[Any]) -> list[Any]:
    """The bare arrays of Tensors, None kept."""
    return [None if g is None else g._data for g in gradients]


def _broadcasts(shapes: Sequence[tuple[int, ...]]) -> bool:
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        return False
    return True


def _number_array(x: Any) -> Any:
    return default_device().backend.asarray(x, dtypes.result_type((), (), (x,)))


_FIRST, _SECOND, _BOTH = (0,), (1,), (0, 1)


def elementwise(
    name: str,
    formula: Callable,
    samples: Sequence[Any] = (),
    doc: str = "",
    *,
    labels: Sequence[str] = (),
    operator: str = "",
    aliases: Sequence[str] = (),
    method: bool = True,
    nn: bool = False,
    in_place: bool = False,
    autocast: str | None = None,
) -> Elementwise:
    """Declare an elementwise operation by its formula; everything else is derived.

    samples: inputs for the generic tests, as (shapes or values…) tuples; see tests/test_ops.py. operator: the Python
    operator it stands for ("add": __add__, __radd__, __iadd__). aliases: other public names. method: whether it is a
    Tensor method too. in_place: whether there is `<name>_`. autocast: see Op.
    """
    made = Elementwise(name, formula, samples, doc, labels=labels, autocast=autocast)
    made.operator, made.has_in_place = operator, in_place or bool(operator)
    function(made, name=name, method=method, nn=nn, aliases=aliases)
    return made
