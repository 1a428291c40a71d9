"""Pytrees: tensors in nested dicts, lists, tuples and named tuples, as one flat list and the structure around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

LEAF: Any = type("Leaf", (), {"__repr__": lambda self: "*"})()


def is_container(x: Any) -> bool:
    """Whether x holds further values; everything else, None included, is a leaf."""
    return isinstance(x, (dict, list, tuple))


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """(leaves, structure): the leaves in order (a dict's in its own), and the tree with LEAF in the place of each."""
    leaves: list[Any] = []
    return leaves, _taken_apart(tree, leaves)


def _taken_apart(x: Any, leaves: list[Any]) -> Any:
    if not is_container(x):
        leaves.append(x)
        return LEAF
    return rebuilt(x, [_taken_apart(v, leaves) for v in children(x)])


def aligned(tree: Any, structure: Any) -> list[Any] | None:
    """The leaves of a tree in the order of a structure, dicts by their keys; None where the tree has another one."""
    leaves: list[Any] = []
    return leaves if _align(tree, structure, leaves) else None


def _align(x: Any, like: Any, leaves: list[Any]) -> bool:
    if like is LEAF:
        leaves.append(x)
        return not is_container(x)
    kind = next(kind for kind in (dict, list, tuple) if isinstance(like, kind))
    if not isinstance(x, kind) or len(x) != len(like):
        return False
    if kind is dict:
        return all(key in x and _align(x[key], part, leaves) for key, part in like.items())
    return all(_align(a, b, leaves) for a, b in zip(x, like, strict=True))


def children(x: Any) -> Iterable[Any]:
    """The values that a container holds, in order."""
    return x.values() if isinstance(x, dict) else x


def rebuilt(like: Any, values: list[Any]) -> Any:
    """A container like another, around other values."""
    if isinstance(like, dict):
        made = dict(zip(like, values, strict=True))
        return made if type(like) is dict else type(like)(made)
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def unflatten(structure: Any, leaves: Iterable[Any]) -> Any:
    """The tree that `flatten` took apart, around other leaves."""
    return _put_together(structure, iter(leaves))


def _put_together(x: Any, rest: Iterator[Any]) -> Any:
    return next(rest) if x is LEAF else rebuilt(x, [_put_together(v, rest) for v in children(x)])


def tree_map(function: Callable, tree: Any, *others: Any) -> Any:
    """function of corresponding leaves, in the structure of the first tree."""
    leaves, structure = flatten(tree)
    return unflatten(structure, [function(*each) for each in zip(leaves, *map(leaves_of, others), strict=True)])


def leaves_of(tree: Any) -> list[Any]:
    """The leaves alone."""
    return flatten(tree)[0]


def spread(prefix: Any, tree: Any, what: str) -> list[Any]:
    """One value of `prefix` for each leaf of `tree`; a leaf of the prefix counts for all that is below it.

    Raises ValueError where the two do not fit; `what` names the prefix in the text.
    """
    if not is_container(prefix):
        return [prefix] * len(leaves_of(tree))
    fits = (
        is_container(tree)
        and isinstance(prefix, dict) == isinstance(tree, dict)
        and len(prefix) == len(tree)
        and (not isinstance(prefix, dict) or prefix.keys() == tree.keys())
    )
    if not fits:
        raise ValueError(
            f"{what} is {prefix!r}, which does not fit the structure {flatten(tree)[1]!r}; give one value for all, or "
            "the same nesting with one value (or None) for each part."
        )
    pairs = [(prefix[k], tree[k]) for k in tree] if isinstance(tree, dict) else zip(prefix, tree, strict=True)
    return [value for part, below in pairs for value in spread(part, below, what)]
