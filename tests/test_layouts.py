"""Where results lie in memory: the rule of gpuad/array/order.py, on each device and for every size."""

from __future__ import annotations

import numpy as np
import pytest
from test_ops import cases, ident, steps

import gpuad
from gpuad import nn
from gpuad.array.order import memory_order
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.op import table

F = nn.functional
# Not elementwise, but what they make has the shape and the order of what they are given.
FOLLOWING = {"cast", "move", "roll", "view_put"}
OTHERS = [
    op
    for op in table.values()
    if not isinstance(op, Elementwise) and not getattr(op, "view", False) and op.name not in FOLLOWING
]


def arranged(generator: np.random.Generator, shape: tuple[int, ...], result: tuple[int, ...]) -> np.ndarray:
    """An array that broadcasts to the result, with its dimensions in any order, perhaps with gaps or expanded."""
    own = [n if generator.random() < 0.8 else 1 for n in shape]
    if generator.random() < 0.3:
        own = own[generator.integers(len(own)) :]
    order = generator.permutation(len(own))
    made = generator.uniform(0.5, 1, [own[i] for i in order]).transpose(np.argsort(order))
    if generator.random() < 0.2:
        made = np.repeat(made, 2, -1)[..., ::2]
    return np.broadcast_to(made, result) if generator.random() < 0.2 else made


def test_memory_order_is_numpys():
    generator = np.random.default_rng(0)
    for _ in range(2000):
        shape = tuple(generator.integers(1, 5, generator.integers(1, 5)).tolist())
        operands = [arranged(generator, shape, shape) for _ in range(generator.integers(1, 4))]
        expected = np.nditer([*operands, None], order="K").operands[-1]
        order = memory_order(operands)
        got = np.empty([expected.shape[i] for i in order.axes]).transpose(order.back)
        assert steps(got) == steps(expected), [(a.shape, a.strides) for a in operands]


# One ufunc; several, whose temporaries have orders of their own; two outputs.
FORMULAS = {
    "add": (lambda x, y, z: x + y, 2),
    "lerp": (gpuad.lerp, 3),
    "product of products": (gpuad.fuse(lambda x, y, z: (x * y) * z + x), 3),
    "a copy beside it": (gpuad.fuse(lambda x, y, z: (x * y, z)), 3),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
@pytest.mark.parametrize("name", FORMULAS)
def test_elementwise_results_follow_their_operands(name, dtype, device):
    formula, arity = FORMULAS[name]
    generator = np.random.default_rng(1)
    for _ in range(60):
        shape = tuple(generator.integers(1, 5, 3).tolist())
        check_order(formula, arity, [arranged(generator, shape, shape).astype(dtype) for _ in range(3)], device)


# Larger ones are computed on the host in blocks, of one ufunc too.
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("orders", [("F", "F", "F"), ("F", "C", "F"), ("F", "F", "row")])
def test_large_elementwise_results_do_too(name, orders, device):
    formula, arity = FORMULAS[name]
    values = np.random.default_rng(2).uniform(0.5, 1, (300, 1000))
    operands = [values[:1] if order == "row" else np.asarray(values, order=order) for order in orders]
    check_order(formula, arity, operands, device)


def check_order(formula, arity: int, operands: list[np.ndarray], device) -> None:
    tensors = [gpuad.from_numpy(a.copy("K")).to(device) for a in operands]
    # The order of what the device holds: copies write out what is broadcast.
    order = memory_order([t._data for t in tensors[:arity]])
    results = formula(*tensors)
    for result, host in zip(
        results if isinstance(results, tuple) else (results,), _numpys(formula, operands), strict=True
    ):
        expected = np.empty([host.shape[i] for i in order.axes]).transpose(order.back)
        assert steps(result) == steps(expected), [(t.shape, t.stride()) for t in tensors]
        np.testing.assert_allclose(result.cpu().numpy(), host, 2e-3 if host.dtype == np.float16 else 1e-12)


def _numpys(formula, operands: list[np.ndarray]) -> list[np.ndarray]:
    results = formula(*[gpuad.tensor(np.ascontiguousarray(a)) for a in operands])
    return [r.numpy() for r in (results if isinstance(results, tuple) else (results,))]


@pytest.mark.parametrize("shape", [(6, 4), (300, 1000)])
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_row_operations_give_c_order(shape, dtype, device):
    plain = gpuad.rand(*shape, device=device).to(dtype)
    turned = gpuad.rand(*shape[::-1], device=device).to(dtype).T
    assert plain.softmax(0).is_contiguous() and plain.softmax(1).is_contiguous()
    assert turned.softmax(0).is_contiguous() and turned.log_softmax(1).is_contiguous()
    weight = gpuad.ones(shape[1], device=device).to(dtype)
    assert F.layer_norm(turned, shape[1:], weight, weight).is_contiguous()
    np.testing.assert_allclose(turned.softmax(1).cpu().numpy(), turned.contiguous().softmax(1).cpu().numpy(), 2e-3)
    np.testing.assert_allclose(plain.softmax(0).cpu().numpy(), plain.T.contiguous().softmax(1).T.cpu().numpy(), 2e-3)
    masked = table["shifted_softmax"](turned, plain, 1.0)
    assert masked.is_contiguous()
    np.testing.assert_allclose(masked.cpu().numpy(), (turned.contiguous() + plain).softmax(1).cpu().numpy(), 2e-3, 2e-3)


@pytest.mark.parametrize("op", OTHERS, ids=ident)
def test_other_results_are_contiguous(op, device):
    for layout in ("transposed", "permuted", "strided", "mixed"):
        for case in cases(op, device, np.float64, layout):
            assert all(y.is_contiguous() for y in case(*case.leaves()))


@pytest.mark.cuda
def test_a_tensor_keeps_its_order_from_device_to_device(cuda_device):
    x = gpuad.rand(4, 3, 2).permute(2, 0, 1)
    there = x.to(cuda_device)
    assert there.stride() == x.stride() == there.cpu().stride()
    np.testing.assert_array_equal(there.cpu().numpy(), x.numpy())
