"""Checkpoints: activations are dropped in the forward pass and computed again when the backward pass needs them.

Built on saved-tensor hooks. In the forward pass each tensor that a node would save is replaced by an empty Holder. The
first holder whose tensor is asked for runs the function again on the saved inputs, and the tensors that this run saves
fill the holders in the same order; it stops as soon as the last one that is still wanted is there. The graph is that of
the forward pass: only values come from the second run, so derivatives of any order go through it as they would without
a checkpoint. Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from gpuad.array.random import default_generator
from gpuad.autograd.autocast import resumed
from gpuad.autograd.levels import Batched, Dual, make_batched, make_dual, open_levels, reopened
from gpuad.autograd.modes import enable_grad, is_grad_enabled, state
from gpuad.autograd.node import Node
from gpuad.autograd.saved import saved_tensors_hooks
from gpuad.errors import AutogradError, ShapeError
from gpuad.tensor import Tensor, wrap

__all__ = ["CheckpointError", "checkpoint", "checkpoint_sequential"]


class CheckpointError(AutogradError):
    """The second run of a checkpointed function did not save what the first run had saved."""


class _Stop(Exception):  # noqa: N818  (no error: everything that is wanted has been computed)
    pass


class _Holder:
    """Stands for one saved tensor: its place in the order of saving. The node that saved it keeps it alive."""

    __slots__ = ("index", "described", "__weakref__")

    def __init__(self, index: int, described: Any) -> None:
        self.index, self.described = index, described


class _Input:
    """A tensor argument: kept by a node, so that changes in place are noticed and checkpoints outside can drop it."""

    class _Op:
        name = "checkpoint"

    def __init__(self, tensor: Tensor) -> None:
        self.requires_grad, self.kind = tensor._requires_grad, type(tensor)
        self.node = Node(self._Op, (), (tensor._data,), (tensor._cell,), tensor._cell[0], None, tensor._device)  # type: ignore[arg-type]

    def tensor(self) -> Tensor:
        """The argument as a leaf of its own."""
        made = wrap(self.node.check()[0], self.node.device)
        made._requires_grad = self.requires_grad
        return made


class _DualInput:
    """A dual number: primal and tangent are kept each."""

    def __init__(self, dual: Dual) -> None:
        self.primal, self.tangent, self.level = _kept(dual.primal), _kept(dual.tangent), dual.level

    def tensor(self) -> Tensor:
        """The dual number again, at the level it had."""
        return make_dual(self.primal.tensor(), self.tangent.tensor(), self.level)


class _BatchedInput:
    """One example of many, inside vmap: all of them are kept."""

    def __init__(self, batched: Batched) -> None:
        self.value, self.level = _kept(batched.value), batched.level

    def tensor(self) -> Tensor:
        """All examples as one again, at the level they had."""
        return make_batched(self.value.tensor(), self.level)


def _kept(x: Any) -> Any:
    if isinstance(x, Dual):
        return _DualInput(x)
    if isinstance(x, Batched):
        return _BatchedInput(x)
    return _Input(x) if isinstance(x, Tensor) else x


def _given(x: Any) -> Any:
    return x.tensor() if isinstance(x, (_Input, _DualInput, _BatchedInput)) else x


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` (nested lists, tuples, named tuples, dictionaries) with the function applied to what lies in it."""
    if isinstance(tree, dict):
        return type(tree)((k, _mapped(function, v)) for k, v in tree.items()) if type(tree) is not dict else {
            k: _mapped(function, v) for k, v in tree.items()
        }  # fmt: skip
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[_mapped(function, v) for v in tree])
    if isinstance(tree, (list, tuple)):
        return type(tree)([_mapped(function, v) for v in tree])
    return function(tree)


class _Frame:
    """One checkpointed call: what runs it again, the holders that it gave out, the values of the second run."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict, preserve_rng_state: bool, check: str) -> None:
        self.function = function
        self.arguments = _mapped(_kept, (args, kwargs))
        self.random = default_generator.get_state() if preserve_rng_state else None
        self.levels = open_levels()
        self.autocast = state.autocast
        self.check = check
        self.holders: list[weakref.ref[_Holder]] = []
        self.values: dict[int, Any] = {}
        self.walk: Any = None

    def pack(self, tensor: Tensor) -> _Holder:
        """In the forward pass: nothing is kept."""
        holder = _Holder(len(self.holders), _describe(tensor) if self.check == "default" else None)
        self.holders.append(weakref.ref(holder))
        return holder

    def unpack(self, holder: _Holder) -> Tensor:
        """In the backward pass: the value, for which everything runs again where it is not there."""
        if self.walk is not state.walk:
            self._enter_walk()
        if holder.index not in self.values:
            self._recompute()
        return self.values.pop(holder.index)

    def _enter_walk(self) -> None:
        """What the second run left over goes when the reverse pass is over."""
        self.values.clear()
        self.walk = state.walk
        if self.walk is not None:
            self.walk.at_end.append(self._leave_walk)

    def _leave_walk(self) -> None:
        self.values.clear()
        self.walk = None

    def _recompute(self) -> None:
        last = max(i for i, holder in enumerate(self.holders) if holder() is not None)
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            holder = self.holders[saved]()
            if holder is not None:
                self._compare(holder, tensor)
                self.values[saved] = tensor
            saved += 1
            if saved > last:
                raise _Stop
            return tensor

        args, kwargs = _mapped(_given, self.arguments)
        before = default_generator.get_state()
        if self.random is not None:
            default_generator.set_state(self.random)
        try:
            with ExitStack() as contexts:
                if self.levels:
                    contexts.enter_context(reopened(self.levels))
                if self.autocast is not None:
                    contexts.enter_context(resumed(self.autocast))
                contexts.enter_context(enable_grad())
                contexts.enter_context(saved_tensors_hooks(pack, _same))
                self.function(*args, **kwargs)
        except _Stop:
            return
        finally:
            if self.random is not None:
                default_generator.set_state(before)
        raise CheckpointError(
            f"The checkpointed function saved {len(self.holders)} tensors for its gradient in the forward pass, but "
            f"only {saved} when it ran again: it did not do the same. What it reads besides its arguments (global "
            "variables, random numbers of generators of its own, the training mode) must be as it was."
        )

    def _compare(self, holder: _Holder, tensor: Tensor) -> None:
        if holder.described is not None and holder.described != _describe(tensor):
            raise CheckpointError(
                f"The checkpointed function did not do the same when it ran again: saved tensor {holder.index} was "
                f"{_written(holder.described)} in the forward pass and is {_written(_describe(tensor))} now. Make the "
                'function depend on its arguments alone, or pass determinism_check="none" where that is meant.'
            )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _describe(tensor: Tensor) -> tuple:
    return tensor._data.shape, tensor._data.dtype, tensor._device


def _written(described: tuple) -> str:
    shape, dtype, device = described
    return f"{dtype} {tuple(shape)} on {device}"


def checkpoint(
    function: Callable,
    *args: Any,
    use_reentrant: bool = False,
    preserve_rng_state: bool = True,
    determinism_check: str = "default",
    **kwargs: Any,
) -> Any:
    """function(*args, **kwargs), whose activations are not kept: the backward pass runs `function` again for them.

    Costs one more forward pass, saves all that lies between the arguments and the result. Arguments and results may
    be nested lists, tuples and dictionaries; gradients go to arguments, and to parameters that the function uses.
    Derivatives of every order, forward mode and checkpoints within checkpoints work as without.

    preserve_rng_state: the second run draws the same random numbers (dropout masks). determinism_check: "default"
    compares shape, dtype and device of what both runs save, "none" does not. use_reentrant: for PyTorch's sake;
    either way the backward pass is PyTorch's for False.
    Errors: CheckpointError when the second run does something else; AutogradError when an argument was changed in
    place in between. Source: Chen et al., arXiv:1604.06174.
    """
    if determinism_check not in ("default", "none"):
        raise ValueError(f'determinism_check is "default" or "none", got {determinism_check!r}.')
    if not is_grad_enabled():
        return function(*args, **kwargs)
    frame = _Frame(function, args, kwargs, preserve_rng_state, determinism_check)
    with saved_tensors_hooks(frame.pack, frame.unpack):
        return function(*args, **kwargs)


def checkpoint_sequential(
    functions: Any,
    segments: int,
    input: Any,
    use_reentrant: bool = False,
    preserve_rng_state: bool = True,
) -> Any:
    """The functions (or the modules of a Sequential) one after another on `input`, in `segments` checkpoints.

    Only the inputs of the segments are kept, and the activations of the last segment, which is no checkpoint since its
    backward comes at once. With √n segments of n layers the tape keeps O(√n) activations.
    Errors: ShapeError when segments is not between 1 and the number of functions.
    """
    steps: Sequence[Callable] = list(functions.children()) if hasattr(functions, "children") else list(functions)
    if not 1 <= segments <= len(steps):
        raise ShapeError(f"checkpoint_sequential() of {len(steps)} functions takes 1 to {len(steps)} segments, got "
                         f"{segments}.")  # fmt: skip
    size = len(steps) // segments

    def run(start: int, end: int) -> Callable:
        def segment(x: Any) -> Any:
            for step in steps[start:end]:
                x = step(x)
            return x

        return segment

    for start in range(0, size * (segments - 1), size):
        input = checkpoint(run(start, start + size), input, use_reentrant=use_reentrant,
                           preserve_rng_state=preserve_rng_state)  # fmt: skip
    return run(size * (segments - 1), len(steps))(input)
