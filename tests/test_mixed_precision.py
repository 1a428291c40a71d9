"""float16 and bfloat16 end to end, autocast and GradScaler: what is computed in which, and training with them."""

from __future__ import annotations

import numpy as np
import pytest
from test_ops import cases, host, ident

import gpuad
from gpuad import nn, optim
from gpuad.amp import GradScaler, custom_bwd, custom_fwd
from gpuad.autograd import grad
from gpuad.autograd.op import table
from gpuad.errors import DtypeError

OPS = list(table.values())
HALVES = [gpuad.float16, gpuad.bfloat16]
# A rounding, of 11 and of 8 bits, and what several of them make of a gradient.
FORWARD = {gpuad.float16: 4e-3, gpuad.bfloat16: 3e-2}
GRADIENT = {gpuad.float16: 2e-2, gpuad.bfloat16: 1.5e-1}


def close(got, expected, tolerance, what):
    expected = np.asarray(expected, np.float64)
    size = np.max(np.abs(expected), initial=1.0)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, tolerance, tolerance * size, err_msg=what)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=ident)
def test_16_bits_agree_with_float32(op, device, dtype):
    """Values and gradients of every op, on the same numbers in both dtypes."""
    for half, wide in zip(cases(op, device, dtype), cases(op, device, np.float32), strict=True):
        small = half.leaves()
        large = [x.detach().to(gpuad.float32).requires_grad_() for x in small]
        results, expected = half(*small), wide(*large)
        for y, z in zip(results, expected, strict=True):
            assert y.dtype == (dtype if z.dtype == gpuad.float32 else z.dtype)
            close(host(y), host(z), FORWARD[dtype], f"{op}")
        outs = [(y, z) for y, z in zip(results, expected, strict=True) if z.requires_grad and z.ndim + z.numel()]
        if not outs or any(not np.isfinite(host(z)).all() for _, z in outs):
            continue
        us = half.like([y for y, _ in outs])
        got = grad([y for y, _ in outs], small, us, materialize_grads=True)
        wanted = grad([z for _, z in outs], large, [u.to(z.dtype) for u, (_, z) in zip(us, outs)],
                      materialize_grads=True)  # fmt: skip
        for g, w in zip(got, wanted, strict=True):
            assert g.dtype == dtype
            close(host(g), host(w), GRADIENT[dtype], f"gradient of {op}")


# autocast -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", HALVES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=ident)
def test_an_op_is_computed_in_what_it_declares(op, device, lower):
    """16 bits in give float32 where the op says so, float32 in gives 16 bits, and gradients come back as given."""
    if op.name == "cast":
        pytest.skip("cast says itself which dtype it gives")
    for dtype, category, expected in ((lower, "float32", gpuad.float32), (gpuad.float32, "lower", lower)):
        for case in cases(op, device, dtype):
            leaves = case.leaves()
            plain = case(*leaves)
            with gpuad.autocast(device.type, lower):
                outs = case(*leaves)
            for y, z in zip(outs, plain, strict=True):
                changed = op.autocast == category and z.dtype == dtype
                assert y.dtype == (expected if changed else z.dtype)
                close(host(y), host(z), FORWARD[lower], f"{op}")
            wanted = [y for y in outs if y.requires_grad]
            if wanted and case.values:
                for x, g in zip(leaves, grad(wanted, leaves, case.like(wanted), materialize_grads=True), strict=True):
                    assert (g.dtype, g.shape, g.device) == (x.dtype, x.shape, x.device)


def test_the_widest_operand_decides_where_an_op_declares_nothing(device):
    half, single = gpuad.ones(3, dtype=gpuad.float16, device=device), gpuad.ones(3, device=device)
    with gpuad.autocast(device.type):
        assert (half + single).dtype == gpuad.float32
        assert (half + half).dtype == gpuad.float16
        assert gpuad.cat([half, single]).dtype == gpuad.float32


def test_functions_made_of_several_ops(device):
    big = gpuad.full((2, 4), 300.0, dtype=gpuad.float16, device=device)  # 300² is beyond float16
    a = gpuad.randn(2, 3, 4, device=device)
    with gpuad.autocast(device.type):
        assert gpuad.norm(big).item() == pytest.approx(300 * 8**0.5)
        assert big.var().dtype == gpuad.float32
        assert big.logsumexp(1).dtype == gpuad.float32
        assert nn.functional.layer_norm(big, (4,)).dtype == gpuad.float32
        for product in (a @ a.mT, a.half() @ gpuad.ones(4, 2, device=device), a[0] @ a[0, 0], a[0].mm(a[0].T)):
            assert product.dtype == gpuad.float16


def test_float64_integers_and_other_devices_are_left_alone(device):
    wide = gpuad.ones(2, 2, dtype=gpuad.float64, device=device)
    whole = gpuad.ones(2, 2, dtype=gpuad.int64, device=device)
    with gpuad.autocast(device.type):
        assert (wide @ wide).dtype == gpuad.float64
        assert (whole @ whole).dtype == gpuad.int64
    with gpuad.autocast("cuda" if device.type == "cpu" else "cpu"):
        assert (wide.float() @ wide.float()).dtype == gpuad.float32


def test_in_place_keeps_the_dtype(device):
    x = gpuad.ones(3, dtype=gpuad.float16, device=device)
    with gpuad.autocast(device.type):
        assert x.exp_().dtype == gpuad.float16
    close(host(x), np.exp(np.ones(3)), FORWARD[gpuad.float16], "exp_")


def test_a_weight_is_cast_once_for_each_dtype():
    weight, x = gpuad.ones(2, 2, requires_grad=True), gpuad.ones(2, 2)
    with gpuad.autocast("cpu"):
        assert (x @ weight).dtype == gpuad.float16
        with gpuad.autocast("cpu", dtype=gpuad.bfloat16):
            assert (x @ weight).dtype == gpuad.bfloat16


def test_nesting_and_decorating():
    a = gpuad.ones(2, 2)

    @gpuad.autocast("cpu", dtype=gpuad.float16)
    def product():
        return a @ a

    assert product().dtype == gpuad.float16
    with gpuad.autocast("cpu"):
        assert gpuad.is_autocast_enabled("cpu") and not gpuad.is_autocast_enabled("cuda")
        with gpuad.autocast("cpu", enabled=False):
            assert (a @ a).dtype == gpuad.float32
            assert not gpuad.is_autocast_enabled("cpu")
        with gpuad.autocast("cuda"):
            assert (a @ a).dtype == gpuad.float16
        assert (a @ a).dtype == gpuad.float16
    assert (a @ a).dtype == gpuad.float32
    assert not gpuad.is_autocast_enabled("cpu")


def test_autocast_is_of_one_thread():
    import threading

    found = []
    a = gpuad.ones(2, 2)
    with gpuad.autocast("cpu"):
        thread = threading.Thread(target=lambda: found.append((a @ a).dtype))
        thread.start()
        thread.join()
    assert found == [gpuad.float32]


def casts(outputs):
    """How many casts there are in the graph."""
    seen, stack = {}, [y.grad_fn for y in outputs]
    while stack:
        node = stack.pop()
        if node is not None and hasattr(node, "op") and id(node) not in seen:
            seen[id(node)] = node
            stack += [parent for parent, _ in node.next_functions]
    return sum(node.op.name == "cast" for node in seen.values())


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_a_weight_is_cast_once_in_a_region(cached):
    weight = gpuad.ones(2, 2, requires_grad=True)
    x = gpuad.ones(2, 2)
    with gpuad.autocast("cpu", cache_enabled=cached):
        with gpuad.no_grad():
            assert (x @ weight).grad_fn is None  # this one must not be what is recorded later
        outs = [x @ weight for _ in range(3)]
    assert casts(outs) == (1 if cached else 3)
    for y in outs:  # the shared cast can be walked once for each
        y.sum().backward()
    np.testing.assert_array_equal(weight.grad.numpy(), np.full((2, 2), 6.0))


def test_a_weight_written_to_inside_a_region_is_cast_anew():
    weight = gpuad.ones(2, 2, requires_grad=True)
    x = gpuad.ones(2, 2)
    with gpuad.autocast("cpu"):
        before = (x @ weight).sum()
        with gpuad.no_grad():
            weight.mul_(3)
        after = (x @ weight).sum()
    assert (before.item(), after.item()) == (8, 24)


def test_higher_derivatives_under_autocast(device):
    x = gpuad.tensor([[0.5, 1.0], [1.5, 0.25]], device=device, requires_grad=True)
    with gpuad.autocast(device.type):
        y = (x @ x).exp().sum()
        (g,) = grad(y, x, create_graph=True)
        assert g.dtype == gpuad.float32
        (h,) = grad(g.sum(), x)
    wide = x.detach().double().requires_grad_()
    (g64,) = grad((wide @ wide).exp().sum(), wide, create_graph=True)
    (h64,) = grad(g64.sum(), wide)
    close(host(g), host(g64), GRADIENT[gpuad.float16], "first")
    close(host(h), host(h64), GRADIENT[gpuad.float16], "second")


def test_forward_mode_under_autocast(device):
    from gpuad.func import jvp

    x, v = gpuad.randn(3, 3, device=device), gpuad.randn(3, 3, device=device)
    with gpuad.autocast(device.type):
        value, tangent = jvp(lambda a: (a @ a).softmax(1), (x,), (v,))
    assert value.dtype == tangent.dtype == gpuad.float32
    expected = jvp(lambda a: (a @ a).softmax(1), (x.double(),), (v.double(),))[1]
    close(host(tangent), host(expected), 5e-2, "tangent")


def test_custom_functions_say_what_they_take():
    seen = []

    class Twice(gpuad.autograd.Function):
        @staticmethod
        @custom_fwd(device_type="cpu", cast_inputs=gpuad.float32)
        def forward(ctx, x):
            seen.append((x.dtype, gpuad.is_autocast_enabled("cpu")))
            return x * 2

        @staticmethod
        @custom_bwd(device_type="cpu")
        def backward(ctx, g):
            seen.append((g.dtype, gpuad.is_autocast_enabled("cpu")))
            return g * 2

    x = gpuad.ones(3, dtype=gpuad.float16, requires_grad=True)
    with gpuad.autocast("cpu"):
        Twice.apply(x).sum().backward()
    assert seen == [(gpuad.float32, False), (gpuad.float32, False)]


def test_what_autocast_refuses():
    with pytest.raises(DtypeError, match="autocast takes dtype=gpuad.float16 or gpuad.bfloat16, got float32"):
        gpuad.autocast("cpu", dtype=gpuad.float32)
    with pytest.raises(ValueError, match="'cuda' or 'cpu', got 'cuda:0'"):
        gpuad.autocast("cuda:0")


# Training -------------------------------------------------------------------------------------------------------------


def data(device):
    """Two classes that a line does not divide."""
    x = gpuad.rand(128, 2, device=device) * 2 - 1
    return x, (x[:, 0] * x[:, 1] > 0).to(gpuad.int64)


def network(device):
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)).to(device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_network_of_16_bits_learns(device, dtype):
    x, y = data(device)
    model = network(device).to(dtype)
    optimizer = optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        optimizer.step()
    assert loss.dtype == dtype
    assert all(p.dtype == p.grad.dtype == dtype for p in model.parameters())
    assert (model(x.to(dtype)).argmax(1) == y).float().mean().item() > 0.95


def train(device, scaler, steps=60, make=optim.Adam):
    x, y = data(device)
    model = network(device)
    optimizer = make(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        with gpuad.autocast(device.type, enabled=scaler.is_enabled()):
            loss = nn.functional.cross_entropy(model(x), y)
        assert loss.dtype == gpuad.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss.item(), [host(p) for p in model.parameters()], optimizer


@pytest.mark.parametrize("make", [optim.Adam, optim.SGD], ids=["adam", "sgd"])
def test_mixed_precision_follows_single_precision(make, device):
    gpuad.manual_seed(1)
    loss, _, _ = train(device, GradScaler(), make=make)
    gpuad.manual_seed(1)
    expected, _, _ = train(device, GradScaler(enabled=False), make=make)
    assert loss == pytest.approx(expected, rel=2e-2)


# GradScaler -----------------------------------------------------------------------------------------------------------

RULES = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=0.1),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, amsgrad=True),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
}


def run(device, make, bad, scaled, transposed=False):
    """Steps on two parameters with given gradients, some of them infinite; without a scaler those are left out."""
    values = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    ps = [gpuad.tensor(v, device=device, requires_grad=True) for v in values]
    optimizer = make(ps)
    scaler = GradScaler(init_scale=8.0, growth_interval=1000)
    gradients = np.random.default_rng(1).standard_normal((6, 2, 4, 3)).astype(np.float32)
    for i, gs in enumerate(gradients):
        if i in bad and not scaled:
            continue
        for p, g in zip(ps, gs, strict=True):
            p.grad = (
                gpuad.tensor(g.T.copy(), device=device).T.detach() if transposed else gpuad.tensor(g, device=device)
            )
        if not scaled:
            optimizer.step()
            continue
        scaler.scale(gpuad.ones((), device=device))
        factor = scaler.get_scale()
        for p in ps:
            p.grad.mul_(factor)
        if i in bad:
            ps[1].grad[2, 1] = float("inf") if i % 2 else float("nan")
        scaler.step(optimizer)
        scaler.update()
    return ps, optimizer, scaler


@pytest.mark.parametrize("transposed", [False, True], ids=["packed", "transposed"])
@pytest.mark.parametrize("rule", RULES)
def test_skipped_steps_leave_no_trace(rule, transposed, device):
    """Parameters, state and step counts are those of a run without the steps that overflowed."""
    bad = {0, 3}
    got, mine, scaler = run(device, RULES[rule], bad, True, transposed)
    expected, theirs, _ = run(device, RULES[rule], bad, False, transposed)
    assert scaler.get_scale() == 8.0 / 4
    for p, q in zip(got, expected, strict=True):
        np.testing.assert_allclose(host(p), host(q), rtol=2e-6)
    a, b = mine.state_dict()["state"], theirs.state_dict()["state"]
    for key in b:
        assert a[key].keys() == b[key].keys()
        for name in b[key]:
            np.testing.assert_allclose(host(a[key][name]), host(b[key][name]), rtol=2e-6, err_msg=name)


def test_a_parameter_that_joins_late_counts_its_own_steps(device):
    first, late = (gpuad.ones(3, device=device, requires_grad=True) for _ in range(2))
    optimizer = optim.Adam([first, late], lr=0.1)
    scaler = GradScaler(init_scale=1.0)
    for value in (np.inf, 1.0, 1.0, np.inf, 1.0):
        scaler.scale(gpuad.ones((), device=device))
        factor = scaler.get_scale()
        first.grad = gpuad.full((3,), value * factor, device=device)
        late.grad = (
            None if optimizer.state[first].get("step", 0) < 2 else gpuad.full((3,), value * factor, device=device)
        )
        scaler.step(optimizer)
        scaler.update()
    state = optimizer.state_dict()["state"]
    assert state[0]["step"].item() == 3
    reference = optim.Adam([q := gpuad.ones(3, device=device, requires_grad=True)], lr=0.1)
    for _ in range(int(state[1]["step"].item())):
        q.grad = gpuad.ones(3, device=device)
        reference.step()
    np.testing.assert_allclose(host(late), host(q), rtol=1e-6)


def test_unscale_then_clip(device):
    p = gpuad.ones(4, device=device, requires_grad=True)
    optimizer = optim.SGD([p], lr=1.0)
    scaler = GradScaler(init_scale=1024.0)
    scaler.scale((p * 3).sum()).backward()
    assert host(p.grad).tolist() == [3072.0] * 4
    scaler.unscale_(optimizer)
    assert host(p.grad).tolist() == [3.0] * 4
    scaler.step(optimizer)
    scaler.update()
    assert host(p).tolist() == [-2.0] * 4


def test_the_scale_grows_and_falls(device):
    p = gpuad.ones(2, device=device, requires_grad=True)
    optimizer = optim.SGD([p], lr=0.0)
    scaler = GradScaler(init_scale=4.0, growth_interval=2)
    found = []
    for value in (1, 1, 1, np.inf, 1, 1):
        scaler.scale(gpuad.ones((), device=device))
        p.grad = gpuad.full((2,), float(value), device=device)
        scaler.step(optimizer)
        scaler.update()
        found.append(scaler.get_scale())
    assert found == [4, 8, 8, 4, 4, 8]
    other = GradScaler()
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()
    assert scaler.state_dict()["_growth_tracker"] == 0


def test_what_the_scaler_refuses():
    p = gpuad.ones(2, requires_grad=True)
    optimizer = optim.SGD([p], lr=0.1)
    scaler = GradScaler()
    with pytest.raises(RuntimeError, match="scaled no loss yet"):
        scaler.step(optimizer)
    scaler = GradScaler()
    loss = scaler.scale(p.sum())
    with pytest.raises(RuntimeError, match="No gradients were found"):
        scaler.step(optimizer)
    scaler = GradScaler()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called on this optimizer since the last update"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(optimizer, closure=lambda: None)
    half = gpuad.ones(2, dtype=gpuad.float16, requires_grad=True)
    scaler = GradScaler()
    scaler.scale(half.sum()).backward()
    with pytest.raises(DtypeError, match="gradients of float16 parameters cannot be unscaled"):
        scaler.step(optim.SGD([half], lr=0.1))
    for wrong in ({"growth_factor": 1.0}, {"backoff_factor": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            GradScaler(**wrong)


@pytest.mark.cuda
@pytest.mark.parametrize("make", [optim.SGD, optim.Adam], ids=["sgd", "adam"])
def test_a_scaled_step_does_not_wait(make, cuda_device, counts):
    """No synchronisation and no copy; two launches more than a step, and three more where steps are counted."""
    x, y = data(cuda_device)
    model = network(cuda_device)
    optimizer = make(model.parameters(), lr=0.01)
    scaler = GradScaler()

    def step():
        optimizer.zero_grad()
        with gpuad.autocast("cuda"):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        with counts() as r:
            scaler.step(optimizer)
        scaler.update()
        return r

    for _ in range(3):
        step()
    with counts() as whole:
        r = step()
    assert not whole.syncs and not whole.stats["copies"] and not whole.stats["mallocs"]
    assert r.kernel_launches == (4 if make is optim.Adam else 2), r.stats["kernels"]


@pytest.mark.cuda
def test_parameters_on_two_devices_skip_together(cuda_device):
    if gpuad.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for places in (("cuda:0", "cuda:1"), ("cuda:0", "cpu")):
        ps = [gpuad.ones(3, device=place, requires_grad=True) for place in places]
        optimizer = optim.Adam(ps, lr=0.1)
        scaler = GradScaler(init_scale=1.0)
        for bad in (1, 0):
            scaler.scale(gpuad.ones((), device="cuda:0"))
            ps[0].grad = gpuad.ones(3, device=places[0])
            ps[1].grad = gpuad.full((3,), float("inf") if bad else 1.0, device=places[1])
            scaler.step(optimizer)
            scaler.update()
            assert [host(p)[0] for p in ps] == pytest.approx([1.0 if bad else 0.9] * 2)
