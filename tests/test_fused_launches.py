"""Norms with weight and bias as one kernel each way, and the gradients of all pieces of a tensor as one."""

from __future__ import annotations

import numpy as np
import pytest

import gpuad
import gpuad.nn.functional as F
from gpuad import nn
from gpuad.errors import ShapeError


def on(device, values, dtype=None, requires_grad: bool = True):
    return gpuad.tensor(np.asarray(values, dtype), device=device, requires_grad=requires_grad)


def numpy(t) -> np.ndarray:
    return t.detach().cpu().numpy().astype(np.float64)


# Norms ----------------------------------------------------------------------------------------------------------------


def reference(x, w, b, g, eps=1e-5):
    """Layer norm and its gradients, written out."""
    mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    inverse = 1 / np.sqrt(var + eps)
    y = (x - mean) * inverse
    gw = g * w
    dx = inverse * (gw - gw.mean(1, keepdims=True) - y * (gw * y).mean(1, keepdims=True))
    return y * w + b, dx, (g * y).sum(0), g.sum(0)


@pytest.mark.parametrize("shape", [(5, 7), (600, 40), (3, 1500)], ids=str)
def test_layer_norm_against_its_gradients_written_out(device, shape):
    """Small, cut into blocks of rows on the host and between blocks of threads, rows longer than a warp takes."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal(shape), rng.standard_normal(shape)
    w, b = rng.standard_normal(shape[1]), rng.standard_normal(shape[1])
    tensors = [on(device, v) for v in (x, w, b)]
    y = F.layer_norm(tensors[0], shape[1], *tensors[1:])
    y.backward(on(device, g, requires_grad=False))
    found = [y, *(t.grad for t in tensors)]
    for a, e in zip(found, reference(x, w, b, g), strict=True):
        np.testing.assert_allclose(numpy(a), e, rtol=1e-9, atol=1e-9)


def test_statistics_of_float16_are_kept_in_float32(device):
    """With a mean of 50, whose spacing in float16 is 1/32: rounded to that, gradients would be off by 3 %."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6, 300)) + 50).astype(np.float16)
    w, b, g = (rng.standard_normal(s).astype(np.float16) for s in (300, 300, (6, 300)))
    tensors = [on(device, v) for v in (x, w, b)]
    y = F.layer_norm(tensors[0], 300, *tensors[1:])
    y.backward(on(device, g, requires_grad=False))
    assert y.dtype == gpuad.float16 and all(t.grad.dtype == gpuad.float16 for t in tensors)
    expected = reference(*(v.astype(np.float64) for v in (x, w, b, g)))
    for a, e in zip([y, *(t.grad for t in tensors)], expected, strict=True):
        np.testing.assert_allclose(numpy(a), e, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_operands_of_different_dtypes_get_gradients_of_their_own(device, norm):
    x = on(device, np.arange(6).reshape(2, 3), np.float16)
    w = on(device, [1, 2, 3], np.float32)
    y = getattr(F, norm)(x, 3, w)
    assert y.dtype == gpuad.float32
    y.square().sum().backward()
    assert (x.grad.dtype, w.grad.dtype) == (gpuad.float16, gpuad.float32)
    wide = on(device, np.arange(6).reshape(2, 3), np.float32)
    getattr(F, norm)(wide, 3, w.detach(), eps=1e-3 if norm == "rms_norm" else 1e-5).square().sum().backward()
    np.testing.assert_allclose(numpy(x.grad), numpy(wide.grad), rtol=3e-3, atol=6e-3)


@pytest.mark.parametrize("norm, what", [("layer_norm", "weight"), ("layer_norm", "bias"), ("rms_norm", "weight")])
def test_parameters_of_another_shape_are_refused(device, norm, what):
    x = on(device, np.ones((2, 3)))
    with pytest.raises(ShapeError, match=rf"{norm} normalises .* \(3,\), but its {what} has shape \(4,\)"):
        getattr(F, norm)(x, 3, **{what: on(device, np.ones(4))})


@pytest.mark.parametrize(
    "make, forward, backward",
    [
        (lambda: nn.LayerNorm(16), 1, 2),
        (lambda: nn.LayerNorm(16, bias=False), 1, 2),
        (lambda: nn.RMSNorm(16), 1, 2),
        # The normalised values, both running statistics, the count of batches; the leaf's gradient is laid out anew.
        (lambda: nn.BatchNorm1d(16), 3, 2),
    ],
    ids=["layer_norm", "layer_norm without bias", "rms_norm", "batch_norm"],
)
def test_launches_of_norms(cuda_device, counts, make, forward, backward):
    layer = make().to(cuda_device)
    x = gpuad.randn(8, 16, device=cuda_device, requires_grad=True)
    g = gpuad.randn(8, 16, device=cuda_device)
    for _ in range(2):
        layer(x).backward(g)
        layer.zero_grad()
        x.grad = None
    with counts() as first:
        y = layer(x)
    with counts() as second:
        y.backward(g)
    assert (first.kernel_launches, second.kernel_launches) == (forward, backward), (first.stats, second.stats)
    assert not first.stats["memsets"] and not second.stats["memsets"]
    with counts() as evaluated:
        layer.eval()(x)
    assert evaluated.kernel_launches == 1


# Pieces ---------------------------------------------------------------------------------------------------------------

APART = {
    "split": lambda x: x.split([1, 2, 3], 1),
    "chunk": lambda x: x.chunk(3, -1),
    "unbind": lambda x: x.unbind(0),
    "unbind in the middle": lambda x: x.unbind(1),
    "many": lambda x: x.reshape(2, 2, -1).unbind(2),
}


@pytest.mark.parametrize("apart", APART)
@pytest.mark.parametrize("used", ["all", "some", "twice"])
def test_gradients_of_pieces(device, apart, used):
    """Some pieces without gradient, some transposed, some used twice; again, recorded, as the second derivative."""
    values = np.random.default_rng(0).standard_normal((3, 6, 4))

    def f(x):
        pieces = APART[apart](x * 1)
        taken = pieces[::2] if used == "some" else pieces
        total = sum(((i + 1) * p.mT.square() * (p.mT if used == "twice" else 1)).sum() for i, p in enumerate(taken))
        return total

    def by_index(x):  # the same without pieces on the tape
        mask = gpuad.zeros_like(x).detach()
        for i, p in enumerate(APART[apart](mask)[:: 2 if used == "some" else 1]):
            p += i + 1
        return (mask * x.square() * (x if used == "twice" else 1)).sum()

    found = []
    for each in (f, by_index):
        x = on(device, values)
        (g,) = gpuad.autograd.grad(each(x), [x], create_graph=True)
        (h,) = gpuad.autograd.grad(g.square().sum(), [x])
        found.append([numpy(each(x)), numpy(g), numpy(h)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_pieces_are_views_that_can_be_written(device):
    x = on(device, np.arange(6.0).reshape(2, 3))
    y = x * 2
    a, b, c = y.unbind(1)
    b.mul_(10)
    assert y[:, 1].tolist() == b.tolist() == [20, 80]
    (a * b * c).sum().backward()
    v = np.arange(6.0).reshape(2, 3)
    expected = 80 * np.stack([v[:, 1] * v[:, 2], v[:, 0] * v[:, 2], v[:, 0] * v[:, 1]], 1)
    np.testing.assert_allclose(numpy(x.grad), expected)


def test_pieces_are_one_operation_on_the_tape(device):
    q, k, v = on(device, np.ones((3, 2))).unbind()
    assert q.grad_fn.parents[0] is k.grad_fn.parents[0] is v.grad_fn.parents[0]
    assert q.grad_fn.name() == "unbind"
    with gpuad.no_grad():
        assert not on(device, np.ones((3, 2))).unbind()[0].requires_grad


def test_launches_of_pieces(cuda_device, counts):
    x = gpuad.randn(3, 5, 4, device=cuda_device, requires_grad=True)
    gs = [gpuad.randn(4, 5, device=cuda_device).T for _ in range(3)]
    for _ in range(2):
        with counts() as r:
            gpuad.autograd.grad(list(x.unbind(0)), [x], gs)
    assert r.kernel_launches == 1 and not r.stats["memsets"] and not r.stats["copies"], r.stats
    with counts() as r:
        gpuad.autograd.grad([x.unbind(0)[1]], [x], gs[:1])
    assert r.kernel_launches == 1 and not r.stats["memsets"], r.stats


# Attention ------------------------------------------------------------------------------------------------------------

KEEP = np.tril(np.ones((3, 5), bool), 1)
MASKS = {"none": None, "bool": KEEP, "added": np.where(KEEP, np.random.default_rng(3).random((3, 5)), -1e4)}


def attention(q, k, v, mask, causal, scale):
    """The formula, written out."""
    scores = q @ np.swapaxes(k, -1, -2) * scale
    if causal:
        mask = np.tril(np.ones(scores.shape[-2:], bool))
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("mask", [*MASKS, "causal"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(device, mask, scale):
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(s) for s in ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6))]
    q, k, v = (on(device, x) for x in values)
    given = MASKS.get(mask)
    tensor = None if given is None else on(device, given, requires_grad=False)
    y = F.scaled_dot_product_attention(q, k, v, tensor, is_causal=mask == "causal", scale=scale)
    expected = attention(*values, given, mask == "causal", scale or 0.5)
    np.testing.assert_allclose(numpy(y), expected, rtol=1e-10, atol=1e-12)
    direction = [rng.standard_normal(x.shape) for x in values]
    y.square().sum().backward()
    step = 1e-6
    above, below = (
        np.square(
            attention(*[x + s * d for x, d in zip(values, direction)], given, mask == "causal", scale or 0.5)
        ).sum()
        for s in (step, -step)
    )
    slope = sum(float((numpy(t.grad) * d).sum()) for t, d in zip((q, k, v), direction, strict=True))
    assert slope == pytest.approx((above - below) / (2 * step), rel=1e-6)


def test_an_added_mask_gets_its_gradient(device):
    rng = np.random.default_rng(0)
    q, k, v = (on(device, rng.standard_normal((2, 3, 4))) for _ in range(3))
    mask = on(device, rng.standard_normal((3, 3)))
    F.scaled_dot_product_attention(q, k, v, mask).square().sum().backward()
    (expected,) = gpuad.autograd.grad((((q @ k.mT) * 0.5 + mask).softmax(-1) @ v).square().sum(), [mask])
    np.testing.assert_allclose(numpy(mask.grad), numpy(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("causal, forward", [(False, 3), (True, 5)], ids=["all", "causal"])
def test_launches_of_attention(cuda_device, counts, causal, forward):
    """Two products and a kernel; which columns a row sees, one number a row, is made by two more.

    Backward: four products, a kernel, and the gradient of k, which comes transposed, laid out anew.
    """
    q, k, v = (gpuad.randn(6, 4, 8, device=cuda_device, requires_grad=True) for _ in range(3))
    g = gpuad.randn(6, 4, 8, device=cuda_device)
    for _ in range(2):
        with counts() as first:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        with counts() as second:
            gpuad.autograd.grad([y], [q, k, v], [g])
    assert first.kernel_launches + first.library_calls == forward, first.stats
    assert second.kernel_launches + second.library_calls == 6, second.stats
