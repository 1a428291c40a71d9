"""bfloat16, NumPy's by the package ml_dtypes: its names, what it promotes to, and what of NumPy it goes through.

That every operation computes in it is in test_mixed_precision.py and test_parity.py.
"""

from __future__ import annotations

import copy
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest

import gpuad
from gpuad import nn, optim
from gpuad.array import dtypes
from gpuad.errors import MissingPackageError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", ["bfloat16", BFLOAT16, ml_dtypes.bfloat16], ids=repr)
def test_it_goes_by_several_names(name):
    assert gpuad.bfloat16 == BFLOAT16 and isinstance(gpuad.bfloat16, gpuad.dtype)
    assert gpuad.zeros(2, dtype=name).dtype == BFLOAT16
    assert gpuad.ones(2).to(name).dtype == BFLOAT16


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    dtypes.bfloat16.cache_clear()
    for ask in (lambda: gpuad.bfloat16, lambda: gpuad.zeros(2, dtype="bfloat16"), lambda: gpuad.ones(2).bfloat16()):
        with pytest.raises(MissingPackageError, match=r'pip install "gpuad\[bfloat16\]"'):
            ask()


# Source: PyTorch documentation, torch.promote_types.
@pytest.mark.parametrize("other, expected", [("bool", BFLOAT16), ("int64", BFLOAT16), ("uint8", BFLOAT16),
                                             ("bfloat16", BFLOAT16), ("float16", gpuad.float32),
                                             ("float32", gpuad.float32), ("float64", gpuad.float64)])  # fmt: skip
def test_promotion(device, other, expected):
    assert gpuad.promote_types(BFLOAT16, other) == gpuad.promote_types(other, BFLOAT16) == expected
    x = gpuad.full((3,), 1.5, dtype=BFLOAT16, device=device, requires_grad=True)
    y = gpuad.ones(3, device=device).to(other)
    for z in (x + y, y * x, gpuad.where(y > 0, x, y), gpuad.maximum(x, y)):
        assert z.dtype == expected
        (g,) = gpuad.autograd.grad(z.sum(), [x])
        assert g.dtype == BFLOAT16
    assert gpuad.cat([x.detach(), y]).dtype == gpuad.stack([y, x.detach()]).dtype == expected


def test_numbers_are_weak(device):
    x = gpuad.full((3,), 1.5, dtype=BFLOAT16, device=device)
    for z in (x + 1, 2.5 * x, x / 3, x**2, x.clamp(0, 1.25), gpuad.where(x > 0, x, 0.0), x.add(x, alpha=0.5)):
        assert z.dtype == BFLOAT16
    assert (x > 1).dtype == gpuad.bool and x.argmax().dtype == gpuad.int64
    x += 0.25
    x[1] = 4
    assert x.dtype == BFLOAT16 and x.tolist() == [1.75, 4.0, 1.75]


def test_a_value_is_that_of_float32_rounded(device):
    x = gpuad.randn(50, 40, device=device).bfloat16()
    w = x.float()
    fused = gpuad.fuse(lambda x: (x * 3).tanh() * 1.1 + x)  # rounded once, at its end
    for f in (lambda x: x * 1.1, fused, lambda x: x.sum(0), lambda x: x.mean(), lambda x: x.softmax(1)):
        rounded = f(w).bfloat16()
        np.testing.assert_allclose(f(x).float().cpu().numpy(), rounded.float().cpu().numpy(), rtol=2**-7)
    long = gpuad.ones(4096, dtype=BFLOAT16, device=device)
    assert long.sum().item() == 4096 and (long @ long).item() == 4096  # a sum in bfloat16 would stop at 256


FUNCTIONS = {
    "sort": lambda x: x.sort(0)[0], "argsort": lambda x: x.argsort(1), "topk": lambda x: x.topk(3, 1)[0],
    "cumsum": lambda x: x.cumsum(1), "max": lambda x: x.max(0)[0], "argmin": lambda x: x.min(1)[1],
    "prod": lambda x: x.prod(0), "tril": lambda x: x.tril(), "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0], "index": lambda x: x[[2, 0]], "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0), "std": lambda x: x.std(0), "repeat": lambda x: x.repeat(2, 1),
    "diagonal": lambda x: x.diagonal(),
    "logsumexp": lambda x: x.logsumexp(0), "round": lambda x: x.round(), "isnan": lambda x: x.isnan(),
}  # fmt: skip


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_numpy_and_cupy_have_functions_for(device, f):
    x = (gpuad.arange(20, device=device).reshape(4, 5) * 7 % 11 - 5).bfloat16()
    found, expected = f(x), f(x.float())
    assert found.dtype == (BFLOAT16 if expected.dtype == gpuad.float32 else expected.dtype)
    np.testing.assert_allclose(found.float().cpu().numpy(), expected.float().cpu().numpy(), rtol=2**-7)


def test_gathered_gradients_are_summed_in_float32(device):
    table = gpuad.zeros(3, 2, dtype=BFLOAT16, device=device, requires_grad=True)
    nn.functional.embedding(gpuad.zeros(1000, dtype=gpuad.int64, device=device), table).sum().backward()
    assert table.grad.dtype == BFLOAT16 and table.grad[0].tolist() == [1000.0, 1000.0]


def test_to_python_and_back(device):
    x = gpuad.tensor([[1.5, -2.0, 0.1]], dtype=BFLOAT16, device=device)
    assert "tensor([[ 1.5   , -2.    ,  0.1001]]" in repr(x) and "dtype=gpuad.bfloat16" in repr(x)
    assert x[0, 0].item() == 1.5 and type(x[0, 0].item()) is float and x.tolist()[0][:2] == [1.5, -2.0]
    assert all(type(number) is float for number in x.tolist()[0])
    assert f"{x[0, 0]:.1f}" == "1.5" and float(x[0, 1]) == -2.0 and bool(x[0, 0])
    array = x.cpu().numpy()
    assert array.dtype == BFLOAT16 and gpuad.from_numpy(array).dtype == BFLOAT16
    assert gpuad.tensor(array, device=device).tolist() == x.tolist() == gpuad.as_tensor(array).tolist()
    for same in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.clone()):
        assert same.dtype == BFLOAT16 and same.tolist() == x.tolist()
    assert np.exp(x).dtype == BFLOAT16 and x.element_size() == 2


def test_random_numbers_and_defaults(device):
    place = {"dtype": BFLOAT16, "device": device}
    for made in (gpuad.randn(8, **place), gpuad.rand(8, **place), gpuad.arange(8, **place), gpuad.eye(8, **place),
                 gpuad.linspace(0, 1, 8, **place), gpuad.full((8,), 0.5, **place)):  # fmt: skip
        assert made.dtype == BFLOAT16 and made.isfinite().all()
    gpuad.set_default_dtype(BFLOAT16)
    try:
        assert gpuad.ones(2).dtype == gpuad.tensor([1.0]).dtype == nn.Linear(2, 2).weight.dtype == BFLOAT16
    finally:
        gpuad.set_default_dtype(gpuad.float32)


@pytest.mark.parametrize("name", [n for n in optim.__all__ if n not in ("Optimizer", "lr_scheduler")])
def test_a_step_is_computed_in_float32(device, name):
    """From the same numbers, both in bfloat16: what one step gives is that of float32, rounded once."""
    start, grad = (gpuad.randn(64, 40, device=device).bfloat16() for _ in range(2))
    found = []
    for dtype in (BFLOAT16, gpuad.float32):
        p = nn.Parameter(start.to(dtype, copy=True))
        p.grad = grad.to(dtype)
        optimizer = getattr(optim, name)([p], lr=0.1)
        optimizer.step()
        assert p.dtype == dtype and all(s.dtype in (dtype, gpuad.float32) for s in tensors(optimizer.state[p]))
        found.append(p.detach().bfloat16().float().cpu().numpy())
    np.testing.assert_allclose(found[0], found[1], rtol=2**-7)


def tensors(state) -> list:
    return [value for value in state.values() if isinstance(value, gpuad.Tensor) and value.ndim]


def test_norms_and_scaling_of_gradients(device):
    ps = [nn.Parameter(gpuad.zeros(30, 7, dtype=BFLOAT16, device=device)) for _ in range(3)]
    for p in ps:
        p.grad = gpuad.full((30, 7), 2.0, dtype=BFLOAT16, device=device)
    norm = nn.utils.clip_grad_norm_(ps, 1.0)
    assert norm.item() == pytest.approx(2 * 630**0.5, rel=1e-2)
    assert ps[0].grad[0, 0].item() == pytest.approx(630**-0.5, rel=1e-2)
    scaler = gpuad.amp.GradScaler(init_scale=4.0)
    optimizer = optim.SGD(ps, lr=1.0)
    optimizer.zero_grad()
    scaler.scale(sum(p.sum() for p in ps)).backward()
    scaler.step(optimizer)
    assert ps[0].tolist() == [[-1.0] * 7] * 30
