"""Row operations as one kernel each way, whatever is given, and the gradients of all pieces of a tensor as one."""

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


# One launch each way --------------------------------------------------------------------------------------------------

SIZES = {"short": (6, 16), "long": (3, 1500)}  # rows by warps, rows by blocks
SUBSETS = [(w, b) for w in (False, True) for b in (False, True)]


def along(name: str) -> dict:
    """softmax and its kin along the last, the first and a middle dimension."""
    op = getattr(F, name)
    return {
        f"{name} {where}": lambda make, n, m, shape=shape, dim=dim: ([x := make(*shape(n, m))], lambda: op(x, dim))
        for where, dim, shape in (
            ("last", -1, lambda n, m: (n, m)),
            ("first", 0, lambda n, m: (m, n)),
            ("middle", 1, lambda n, m: (2, m, n)),
        )
    }


def classified(name: str, probabilities: bool = False, **options) -> dict:
    """The losses of classes, in each reduction; (N, C) and (N, C, L)."""

    def case(make, n, m, shape, reduction):
        x = make(*shape(n, m))
        where = (*x.shape[:1], *x.shape[2:])
        target = gpuad.randint(0, m, where, device=x.device)
        if probabilities:
            target = make(*x.shape).detach().abs()
        given = {k: make(m).detach().abs() if k == "weight" else v for k, v in options.items()}
        return [x], lambda: getattr(F, name)(x, target, reduction=reduction, **given)

    said = " ".join([name, *(["probabilities"] if probabilities else []), *options])
    return {
        f"{said} {reduction} {where}": lambda make, n, m, s=shape, r=reduction: case(make, n, m, s, r)
        for reduction in ("mean", "sum", "none")
        for where, shape in (("last", lambda n, m: (n, m)), ("middle", lambda n, m: (2, m, n)))
    }


def last_norm(name: str, weight: bool, bias: bool) -> dict:
    def case(make, shape, over):
        x, parameters = make(*shape), [make(*over) if there else None for there in (weight, bias)]
        kept = parameters if name == "layer_norm" else parameters[:1]
        leaves = [x, *(p for p in kept if p is not None)]
        return leaves, lambda: getattr(F, name)(x, over, *kept)

    return {
        f"{name} weight={weight} bias={bias}": lambda make, n, m: case(make, (n, m), (m,)),
        f"{name} weight={weight} bias={bias} of two dimensions": lambda make, n, m: case(
            make, (2, n, m // 2, 2), (m // 2, 2)
        ),
    }


def batch_norm(mode: str, weight: bool, bias: bool) -> dict:
    def case(make, shape):
        x, parameters = make(*shape), [make(shape[1]) if there else None for there in (weight, bias)]
        mean, var = (None, None) if mode == "batch" else (make(shape[1]).detach(), make(shape[1]).detach().abs() + 1)
        leaves = [x, *(p for p in parameters if p is not None)]
        return leaves, lambda: F.batch_norm(x, mean, var, *parameters, training=mode != "evaluation")

    return {
        f"batch_norm {mode} weight={weight} bias={bias}": lambda make, n, m: case(make, (m, n)),
        f"batch_norm {mode} weight={weight} bias={bias} of (N, C, L)": lambda make, n, m: case(make, (m // 3, n, 3)),
    }


ROWS = {
    **along("softmax"), **along("log_softmax"),
    **classified("cross_entropy"), **classified("cross_entropy", ignore_index=1),
    **classified("cross_entropy", weight=1), **classified("cross_entropy", label_smoothing=0.1),
    **classified("cross_entropy", weight=1, label_smoothing=0.1, ignore_index=1),
    **classified("cross_entropy", True), **classified("cross_entropy", True, weight=1),
    **classified("cross_entropy", True, weight=1, label_smoothing=0.1),
    **classified("nll_loss"), **classified("nll_loss", weight=1, ignore_index=1),
    **{k: v for w, b in SUBSETS for k, v in last_norm("layer_norm", w, b).items()},
    **last_norm("rms_norm", False, False), **last_norm("rms_norm", True, False),
    **{k: v for mode in ("running", "batch", "evaluation") for w, b in SUBSETS
       for k, v in batch_norm(mode, w, b).items()},
}  # fmt: skip


@pytest.mark.parametrize(
    "size, dtype", [("short", "float32"), ("long", "float32"), ("short", "float16"), ("long", "float64")]
)
@pytest.mark.parametrize("case", ROWS)
def test_row_operations_are_one_launch_each_way(cuda_device, counts, case, size, dtype):
    def make(*shape):
        return on(cuda_device, np.random.default_rng(0).standard_normal(shape), dtype)

    leaves, f = ROWS[case](make, *SIZES[size])
    for _ in range(2):
        with counts() as first:
            y = f()
        g = make(*y.shape).detach()
        with counts() as second:
            gradients = gpuad.autograd.grad([y], leaves, [g])
    assert (first.kernel_launches, second.kernel_launches) == (1, 1), (first.stats, second.stats)
    for r in (first, second):
        assert not r.stats["memsets"] and not r.stats["copies"] and not r.syncs and not r.library_calls, r.stats
    assert all(np.isfinite(numpy(t)).all() for t in (y, *gradients))


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d])
def test_launches_of_norm_layers(cuda_device, counts, make):
    """A batch norm counts its batches, which is one more; .grad takes over what backward made."""
    layer = make(16).to(cuda_device)
    x = gpuad.randn(8, 16, device=cuda_device, requires_grad=True)
    g = gpuad.randn(8, 16, device=cuda_device)
    for _ in range(2):
        with counts() as first:
            y = layer(x)
        with counts() as second:
            y.backward(g)
        x.grad = None
        for p in layer.parameters():
            p.grad = None
    assert first.kernel_launches == (2 if make is nn.BatchNorm1d else 1), first.stats
    assert second.kernel_launches == 1 and not second.stats["memsets"], second.stats
    with counts() as evaluated:
        layer.eval()(x)
    assert evaluated.kernel_launches == 1


# Row operations along any dimensions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
@pytest.mark.parametrize("shape", [(5, 3, 4), (40, 3, 50), (300, 4, 300)], ids=str)
def test_batch_norm_where_it_lies(device, shape, layout):
    """Few elements, many with short and long runs of neighbours; incoming gradients of other strides."""
    rng = np.random.default_rng(0)
    values, g = rng.standard_normal(shape), rng.standard_normal(shape)
    if layout == "expanded":
        g = np.broadcast_to(g[:, :, :1], shape)
    w, b = rng.standard_normal((2, shape[1]))
    x, weight, bias = (on(device, v) for v in (values.T if layout == "transposed" else values, w, b))
    gradient = on(device, g[:, :, :1] if layout == "expanded" else g, requires_grad=False).expand(shape)
    y = F.batch_norm(x.permute(2, 1, 0) if layout == "transposed" else x, None, None, weight, bias, True)
    y.backward(gradient)
    assert y._data.flags.c_contiguous

    def rows(a):
        return a.transpose(1, 0, 2).reshape(shape[1], -1)

    flat, flat_g = rows(values), rows(g)
    mean, inverse = flat.mean(1, keepdims=True), 1 / np.sqrt(flat.var(1, keepdims=True) + 1e-5)
    n = (flat - mean) * inverse
    gw = flat_g * w[:, None]
    dx = inverse * (gw - gw.mean(1, keepdims=True) - n * (gw * n).mean(1, keepdims=True))
    found = numpy(x.grad.permute(2, 1, 0) if layout == "transposed" else x.grad)
    for a, e in zip((rows(numpy(y)), rows(found), numpy(weight.grad), numpy(bias.grad)),
                    (n * w[:, None] + b[:, None], dx, (flat_g * n).sum(1), flat_g.sum(1)), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, e, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"ignore_index": 1, "label_smoothing": 0.2}], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_its_composition(device, options, reduction, weighted):
    """Values, gradients of input and weight, and the gradients of those."""
    rng = np.random.default_rng(0)
    values, labels, weights = rng.standard_normal((4, 3, 5)), rng.integers(0, 3, (4, 5)), rng.random(3) + 0.5
    labels[0, 0] = 1
    target = on(device, labels, requires_grad=False)

    def composed(x, w):
        logp = x.log_softmax(1)
        share = (target != options.get("ignore_index", -100)).to(x.dtype)
        shares = share * (w[target] if weighted else 1)
        picked = -logp.gather(1, target.unsqueeze(1)).squeeze(1) * shares
        spread = -(logp * w.reshape(3, 1) if weighted else logp).sum(1) * share / 3
        s = options.get("label_smoothing", 0.0)
        loss = (1 - s) * picked + s * spread
        return loss if reduction == "none" else loss.sum() / (shares.sum() if reduction == "mean" else 1)

    def whole(x, w):
        return F.cross_entropy(x, target, w if weighted else None, reduction=reduction, **options)

    results = []
    for f in (composed, whole):
        leaves = [on(device, values), on(device, weights)][: 2 if weighted else 1]
        y = f(leaves[0], leaves[-1])
        gradients = gpuad.autograd.grad(y.square().sum(), leaves, create_graph=True)
        seconds = gpuad.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
        results.append([numpy(t) for t in (y, *gradients, *seconds)])
    for a, e in zip(*results, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-11)


def test_row_operations_refuse_operands_of_other_shapes(device):
    x, short = on(device, np.ones((4, 3))), on(device, np.ones(2))
    for given in ({"weight": short}, {"bias": short}, {"running_mean": short, "running_var": short}):
        with pytest.raises(ShapeError, match=r"3 channels, and \w+ of shape \(2,\); it must have one value for each"):
            F.batch_norm(x, **{"running_mean": None, "running_var": None, **given}, training=True)
    with pytest.raises(ShapeError, match=r"cross_entropy\w* takes weight of shape \(3,\)"):
        F.cross_entropy(x, gpuad.zeros(4, dtype=gpuad.int64, device=device), short)


# Running statistics ---------------------------------------------------------------------------------------------------


def running(device, dtype="float64", channels: int = 3):
    rng = np.random.default_rng(1)
    return [on(device, rng.random(channels) + 0.5, dtype, requires_grad=False) for _ in range(2)]


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4), (700, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype, own", [("float64", "float64"), ("float16", "float32"), ("float32", "float16")])
def test_running_statistics_move_in_place(device, shape, dtype, own):
    """In their own dtype, computed in that of the batch or float32; as copy_ does, with a new version of the memory."""
    x = on(device, np.random.default_rng(0).standard_normal(shape) * 2 + 1, dtype)
    mean, var = running(device, own)
    before, versions = [numpy(mean), numpy(var)], [mean._version, var._version]
    addresses = [t.data_ptr() for t in (mean, var)]
    y = F.batch_norm(x, mean, var, training=True, momentum=0.3)
    assert y.dtype == x.dtype and mean.dtype == var.dtype == np.dtype(own)
    assert [t.data_ptr() for t in (mean, var)] == addresses
    assert [mean._version, var._version] == [v + 1 for v in versions]
    flat = np.moveaxis(numpy(x), 1, 0).reshape(3, -1)
    tolerance = 1e-12 if own == dtype else 2e-3
    np.testing.assert_allclose(numpy(mean), 0.7 * before[0] + 0.3 * flat.mean(1), rtol=tolerance)
    np.testing.assert_allclose(numpy(var), 0.7 * before[1] + 0.3 * flat.var(1, ddof=1), rtol=tolerance)
    y.float().sum().backward()
    assert not mean.requires_grad and x.grad is not None


def test_running_statistics_may_be_views(device):
    both = gpuad.zeros(3, 2, device=device, dtype=gpuad.float64)
    mean, var = both.unbind(1)
    x = on(device, np.random.default_rng(0).standard_normal((8, 3)))
    kept = both * 1.0
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    np.testing.assert_allclose(numpy(both), np.stack([numpy(x).mean(0), numpy(x).var(0, ddof=1)], 1))
    assert not numpy(kept).any()


def test_what_fails_leaves_running_statistics_as_they_were(device):
    mean, var = running(device)
    before = [numpy(mean), numpy(var)]
    x = on(device, np.ones((4, 3)))
    for wrong in (
        lambda: F.batch_norm(x, mean, var, on(device, np.ones(2)), training=True),
        lambda: F.batch_norm(on(device, np.ones((1, 3))), mean, var, training=True),
        lambda: F.batch_norm(x, mean, on(device, np.ones(1), requires_grad=False).expand(3), training=True),
    ):
        with pytest.raises(ShapeError):
            wrong()
    for now, then in zip((mean, var), before, strict=True):
        assert numpy(now).tolist() == then.tolist() and now._version == 0


def test_a_statistic_that_was_saved_and_moved_since_is_noticed(device):
    mean, var = running(device)
    x = on(device, np.random.default_rng(0).standard_normal((4, 3)))
    y = F.batch_norm(x, mean, var)
    F.batch_norm(x.detach(), mean, var, training=True)
    with pytest.raises(gpuad.errors.AutogradError, match="batch_norm_given"):
        y.sum().backward()


def test_running_statistics_under_forward_mode(device):
    mean, var = running(device)
    again = [mean.clone(), var.clone()]
    x = on(device, np.random.default_rng(0).standard_normal((4, 3)), requires_grad=False)
    y, moved = gpuad.func.jvp(lambda x: F.batch_norm(x, mean, var, training=True), (x,), (x,))
    expected = F.batch_norm(x, *again, training=True)
    np.testing.assert_allclose(numpy(y), numpy(expected), rtol=1e-12)
    np.testing.assert_allclose(numpy(moved), 0, atol=1e-4)  # scaled, a batch has the same normalised values
    for a, b in zip((mean, var), again, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-12)


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


@pytest.mark.parametrize("causal, forward", [(False, 3), (True, 4)], ids=["all", "causal"])
def test_launches_of_attention(cuda_device, counts, causal, forward):
    """Two products and a kernel; which columns a row sees, one number a row, is made by one more.

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
