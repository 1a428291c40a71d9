"""Hooks: on tensors, nodes, saved tensors and modules; their order, handles, what they may return; graph edges."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import gpuad
from gpuad import nn, optim
from gpuad.autograd import grad, graph
from gpuad.errors import AutogradError, DtypeError, ShapeError


def leaf(values, device):
    return gpuad.tensor(values, device=device, requires_grad=True)


def values_of(tensor):
    return tensor.detach().cpu().tolist()


# Tensors and nodes ----------------------------------------------------------------------------------------------------


def test_order_of_hooks(device):
    """Tensor hooks, retain_grad, prehooks of the node, the node's rule, its hooks: in order of registration."""
    x = leaf([2.0], device)
    y = x * 3
    seen = []
    y.grad_fn.register_hook(lambda grads, outputs: seen.append(("after", values_of(grads[0]), values_of(outputs[0]))))
    y.grad_fn.register_prehook(lambda outputs: seen.append(("before", values_of(outputs[0]))))
    y.retain_grad()
    y.register_hook(lambda g: seen.append(("tensor", values_of(g))))
    y.register_hook(lambda g: g * 10)
    x.register_post_accumulate_grad_hook(lambda t: seen.append(("leaf", values_of(t.grad))))
    y.sum().backward()
    assert seen == [("tensor", [1.0]), ("before", [10.0]), ("after", [30.0], [10.0]), ("leaf", [30.0])]
    assert values_of(y.grad) == [10.0]  # after the hooks that came later, too


def test_node_hooks_replace_gradients(device):
    x, w = leaf([2.0], device), leaf([5.0], device)
    y = x * w
    before = y.grad_fn.register_prehook(lambda outputs: (outputs[0] * 2,))
    after = y.grad_fn.register_hook(lambda grads, outputs: (grads[0] + 1, None))
    y.sum().backward(retain_graph=True)
    assert values_of(x.grad) == [11.0] and w.grad is None
    after.remove()
    x.grad = None
    y.sum().backward(retain_graph=True)
    assert values_of(x.grad) == [10.0] and values_of(w.grad) == [4.0]
    before.remove()
    before.remove()
    x.grad = None
    y.sum().backward()
    assert values_of(x.grad) == [5.0]


def test_node_hooks_see_what_is_written_straight_into_the_leaf(device):
    """With a buffer left by zero_grad a product's gradient goes straight there; with a hook it is seen first."""
    layer = nn.Linear(3, 2).to(device)
    x = gpuad.ones(4, 3, device=device)
    optimizer = optim.SGD(layer.parameters(), lr=0.0)
    layer(x).sum().backward()
    expected = values_of(layer.weight.grad)
    optimizer.zero_grad()
    y = layer(x)
    seen = []
    y.grad_fn.register_hook(lambda grads, outputs: seen.append([None if g is None else tuple(g.shape) for g in grads]))
    y.sum().backward()
    assert values_of(layer.weight.grad) == expected
    assert len(seen) == 1 and (2, 3) in seen[0] or (3, 2) in seen[0]


def test_node_hooks_only_run_with_their_node(device):
    """A tensor's hook runs when its gradient is computed, a node's only when its rule runs."""
    x = leaf([1.0], device)
    y = x * 2
    seen = []
    y.register_hook(lambda g: seen.append("tensor"))
    y.grad_fn.register_prehook(lambda g: seen.append("before"))
    y.grad_fn.register_hook(lambda a, b: seen.append("after"))
    z = (y * y).sum()
    grad(z, y, retain_graph=True)
    assert seen == ["tensor"]
    grad(z, [x, y])
    assert seen == ["tensor", "tensor", "before", "after"]


def test_hooks_of_an_operation_with_several_outputs(device):
    x = leaf([1.0, 2.0, 3.0], device)

    class Split(gpuad.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1, x * 2

        @staticmethod
        def backward(ctx, a, b):
            return a + 2 * b

    a, b = Split.apply(x)
    seen = []
    a.grad_fn.register_prehook(lambda outputs: seen.append([None if g is None else values_of(g) for g in outputs]))
    assert b.grad_fn.metadata is a.grad_fn.metadata
    (a * 5).sum().backward()
    assert seen == [[[5.0] * 3, None]]
    assert [n for _, n in (a + b).grad_fn.next_functions] == [0, 1]


def test_node_hooks_under_create_graph(device):
    x = leaf([3.0], device)
    y = x * x
    y.grad_fn.register_hook(lambda grads, outputs: tuple(None if g is None else g * g for g in grads))
    (g,) = grad(y.sum(), x, create_graph=True)
    assert values_of(g) == [18.0]  # 2 · x²: each of the two factors' gradients squared
    assert values_of(grad(g.sum(), x)[0]) == [12.0]


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        ("a number", TypeError, "'hook' returned a str; a hook returns a Tensor, or None"),
        (gpuad.ones(3), ShapeError, r"shape \(3,\) in place of one of shape \(2,\)"),
        (gpuad.ones(2, dtype="float64"), DtypeError, r"float64 gradient in place of a float32 one.*g\.to"),
    ],
    ids=["kind", "shape", "dtype"],
)
def test_what_a_hook_returns_is_checked(returned, error, text):
    def hook(g):
        return returned

    x = gpuad.ones(2, requires_grad=True)
    for y in (x, x * 2):
        with y.register_hook(hook), pytest.raises(error, match=text):
            (y * 1).sum().backward()


def test_what_a_node_hook_returns_is_checked():
    x = gpuad.ones(2, requires_grad=True)
    y = x * 2
    with (
        y.grad_fn.register_prehook(lambda g: (g[0], g[0])),
        pytest.raises(AutogradError, match="2 gradients in place of 1"),
    ):
        y.sum().backward()
    z = x * 2
    z.grad_fn.register_hook(lambda grads, outputs: (grads[0], grads[0]))
    with pytest.raises(AutogradError, match="returned a gradient where there was none"):
        z.sum().backward()


def test_hooks_registered_while_hooks_run(device):
    x = leaf([1.0], device)
    seen = []

    def hook(g):
        seen.append("first")
        x.register_hook(lambda g: seen.append("second"))

    x.register_hook(hook)
    (x * 2).sum().backward()
    assert seen == ["first"]
    (x * 2).sum().backward()
    assert seen == ["first", "first", "second"]


def test_metadata(device):
    y = leaf([1.0], device) * 2
    y.grad_fn.metadata["note"] = 1
    assert y.grad_fn.metadata == {"note": 1} and isinstance(y.grad_fn, graph.Node) and y.grad_fn.name() == "mul"


# Saved tensors --------------------------------------------------------------------------------------------------------


def test_saved_tensor_hooks(device):
    x, w = leaf([2.0, 3.0], device), leaf([4.0, 5.0], device)
    packed, unpacked = [], []

    def pack(t):
        assert isinstance(t, gpuad.Tensor) and not t.requires_grad and not gpuad.is_grad_enabled()
        packed.append(values_of(t))
        return t.cpu().numpy() * 10

    def unpack(array):
        unpacked.append(array.tolist())
        return gpuad.tensor(array / 10, device=device)

    with graph.saved_tensors_hooks(pack, unpack):
        y = x * w
    z = y.exp()  # outside: kept as ever
    assert packed == [[2.0, 3.0], [4.0, 5.0]] and unpacked == []
    (y.sum() + 0 * z.sum()).backward()
    assert unpacked == [[20.0, 30.0], [40.0, 50.0]]
    assert values_of(x.grad) == [4.0, 5.0] and values_of(w.grad) == [2.0, 3.0]


def test_saved_tensors_of_every_kind_of_node(device):
    """Elementwise, broadcasting, products, rows, reduced losses, functions of one's own: halved when packed."""

    class Square(gpuad.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    x, w = leaf(np.random.default_rng(0).normal(size=(4, 3)).tolist(), device), leaf([[0.5, -1.0, 2.0]], device)

    def loss():
        y = Square.apply(gpuad.softmax(x * w, -1)) @ x.T
        return (
            nn.functional.cross_entropy(y.tanh(), gpuad.tensor([0, 1, 2, 3], device=device))
            + (y / w.exp().sum()).amax()
        )

    expected = grad(loss(), [x, w])
    count = []

    def pack(t):
        count.append(1)
        return t * 0.5 if t.is_floating_point() else t

    with graph.saved_tensors_hooks(pack, lambda t: t * 2 if t.is_floating_point() else t):
        found = grad(loss(), [x, w])
    assert len(count) > 8
    for a, b in zip(expected, found, strict=True):
        assert values_of(a) == values_of(b)


def test_saved_tensor_hooks_and_higher_orders(device):
    x = leaf([0.3, 0.7], device)

    def third(y):
        (a,) = grad(y.sum(), x, create_graph=True)
        (b,) = grad(a.sum(), x, create_graph=True)
        return grad(b.sum(), x)[0]

    expected = third((x.sin() * x).exp())
    with graph.saved_tensors_hooks(lambda t: (t.cpu().numpy(),), lambda p: gpuad.tensor(p[0], device=device)):
        y = (x.sin() * x).exp()
    np.testing.assert_allclose(values_of(third(y)), values_of(expected), rtol=1e-5)


def test_innermost_saved_tensor_hooks_apply_and_belong_to_their_thread():
    import threading

    x = gpuad.ones(2, requires_grad=True)
    seen = []
    with graph.saved_tensors_hooks(lambda t: seen.append("outer") or t, lambda t: t):
        with graph.saved_tensors_hooks(lambda t: seen.append("inner") or t, lambda t: t):
            x * x
        x.exp()
        thread = threading.Thread(target=lambda: x.sin())
        thread.start()
        thread.join()
    x.exp()
    assert seen == ["inner", "inner", "outer"]


def test_saved_tensor_hooks_may_not_write_and_must_return_tensors():
    x = gpuad.ones(2, requires_grad=True)
    with graph.saved_tensors_hooks(lambda t: t.mul_(2), lambda t: t), pytest.raises(AutogradError, match="in place"):
        x * x
    with graph.saved_tensors_hooks(lambda t: 1, lambda t: t):
        y = x.exp()
    with pytest.raises(TypeError, match="unpack hook of saved tensors returned a int"):
        y.sum().backward()


def test_changes_in_place_are_noticed_where_nothing_was_copied():
    x = gpuad.ones(2, requires_grad=True)
    for pack, unpack, noticed in ((lambda t: t, lambda t: t, True), (lambda t: t.clone(), lambda t: t, False)):
        y = x * 2
        with graph.saved_tensors_hooks(pack, unpack):
            z = y * y
        y.add_(1)
        if noticed:
            with pytest.raises(AutogradError, match="changed in place"):
                z.sum().backward()
        else:
            z.sum().backward()
            assert values_of(x.grad) == [8.0, 8.0]


def test_disabled_saved_tensor_hooks():
    hooks = graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with graph.disable_saved_tensors_hooks("no hooks here"), pytest.raises(AutogradError, match="no hooks here"):
        hooks.__enter__()
    with hooks, pytest.raises(AutogradError, match="not now"):
        graph.disable_saved_tensors_hooks("not now").__enter__()
    with hooks:
        pass


def test_nothing_is_left_behind_by_saved_tensor_hooks():
    plain = graph.Node.__init__
    with graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert graph.Node.__init__ is not plain
    with pytest.raises(ZeroDivisionError), graph.saved_tensors_hooks(lambda t: 1 / 0, lambda t: t):
        gpuad.ones(2, requires_grad=True).exp()
    assert graph.Node.__init__ is plain and gpuad.is_grad_enabled()


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
def test_save_on_cpu(device, pinned):
    x = leaf([[1.0, 2.0], [3.0, 4.0]], device)
    with graph.save_on_cpu(pin_memory=pinned):
        y = (x.exp() @ x.T).tanh().sum() + (x[:0] * x[:0]).sum()
    (found,) = grad(y, x)
    (expected,) = grad((x.exp() @ x.T).tanh().sum(), x)
    assert values_of(found) == values_of(expected) and found.device is x.device


@pytest.mark.cuda
def test_save_on_cpu_frees_device_memory(cuda_device):
    """Of a chain nothing stays on the device but the last value."""
    import cupy

    x = gpuad.ones(1 << 16, device=cuda_device, requires_grad=True)
    gc.collect()
    with cupy.cuda.Device(cuda_device.index):
        before = cupy.get_default_memory_pool().used_bytes()
        with graph.save_on_cpu():
            y = x
            for _ in range(8):
                y = y.exp().log1p()
        assert cupy.get_default_memory_pool().used_bytes() - before == y.nbytes


# Edges ----------------------------------------------------------------------------------------------------------------


def test_gradient_edges(device):
    x = leaf([1.0, 2.0], device)
    y = x * 3
    z = (y * y).sum()
    edge = graph.get_gradient_edge(y)
    assert edge == graph.GradientEdge(y.grad_fn, 0)
    del y
    assert values_of(grad(z, edge, retain_graph=True)[0]) == [6.0, 12.0]
    assert values_of(grad(edge, x, gpuad.ones(2, device=device), retain_graph=True)[0]) == [3.0, 3.0]
    assert values_of(grad(z, graph.get_gradient_edge(x))[0]) == [18.0, 36.0]
    with pytest.raises(AutogradError, match="requires grad"):
        graph.get_gradient_edge(gpuad.ones(1))
    with pytest.raises(AutogradError, match="grad_tensors="):
        gpuad.autograd.backward(edge)


# Modules --------------------------------------------------------------------------------------------------------------


def test_full_backward_hooks(device):
    layer = nn.Linear(2, 1, bias=False).to(device)
    layer.weight.data = gpuad.tensor([[2.0, 3.0]], device=device)
    x = leaf([[1.0, 1.0]], device)
    seen = []
    layer.register_full_backward_hook(
        lambda m, grad_input, grad_output: seen.append(
            (m is layer, values_of(grad_input[0]), values_of(grad_output[0]))
        )
    )
    handle = layer.register_full_backward_pre_hook(lambda m, grad_output: (grad_output[0] * 10,))
    layer(x).sum().backward()
    assert seen == [(True, [[20.0, 30.0]], [[10.0]])]
    assert values_of(x.grad) == [[20.0, 30.0]] and values_of(layer.weight.grad) == [[10.0, 10.0]]
    handle.remove()
    changing = layer.register_full_backward_hook(lambda m, grad_input, grad_output: (grad_input[0] * 0 + 1,))
    x.grad = None
    layer(x).sum().backward()
    assert values_of(x.grad) == [[1.0, 1.0]] and seen[1][1:] == ([[2.0, 3.0]], [[1.0]])
    changing.remove()
    first = layer.register_full_backward_hook(lambda m, a, b: seen.append("first"), prepend=True)
    del seen[:]
    layer(x).sum().backward()
    assert seen[0] == "first" and len(seen) == 2
    first.remove()


class Two(nn.Module):
    """Two inputs, a number, two outputs."""

    def forward(self, a, b, factor):
        return a * factor, b * b


def test_full_backward_hooks_of_several_inputs_and_outputs(device):
    module = Two()
    a, b = leaf([1.0], device), leaf([2.0], device)
    seen = []
    module.register_full_backward_hook(lambda m, inputs, outputs: seen.append((inputs, outputs)))
    p, q = module(a, b, 3.0)
    (p + q).sum().backward()
    (((ga, gb, number), (gp, gq)),) = seen
    assert number is None and [values_of(g) for g in (ga, gb, gp, gq)] == [[3.0], [4.0], [1.0], [1.0]]


def test_full_backward_hook_without_inputs_that_require_grad(device):
    layer = nn.Linear(2, 1).to(device)
    seen = []
    layer.register_full_backward_hook(
        lambda m, grad_input, grad_output: seen.append((grad_input, values_of(grad_output[0])))
    )
    layer(gpuad.ones(3, 2, device=device)).sum().backward()
    assert seen == [((None,), [[1.0]] * 3)]
    layer.register_full_backward_hook(lambda m, grad_input, grad_output: grad_output)
    with pytest.raises(RuntimeError, match="no input requires grad"):
        layer(gpuad.ones(3, 2, device=device)).sum().backward()
    with gpuad.no_grad():
        assert layer(gpuad.ones(3, 2, device=device)).shape == (3, 1)


def test_full_backward_hooks_through_higher_orders(device):
    module = nn.Sequential(nn.Tanh())
    x = leaf([0.5], device)
    (g,) = grad(module(x).sum(), x, create_graph=True)
    expected = values_of(grad(g.sum(), x)[0])
    seen = []
    module.register_full_backward_hook(lambda m, a, b: seen.append(1))
    (g,) = grad(module(x).sum(), x, create_graph=True)
    assert values_of(grad(g.sum(), x)[0]) == expected and seen == [1]


def test_full_backward_hook_that_returns_the_wrong_number():
    module = Two()
    module.register_full_backward_hook(lambda m, a, b: a[:1])
    p, _ = module(gpuad.ones(1, requires_grad=True), gpuad.ones(1, requires_grad=True), 2.0)
    with pytest.raises(RuntimeError, match="1 gradients in place of 3"):
        p.sum().backward()


# Post-accumulate hooks ------------------------------------------------------------------------------------------------


def test_post_accumulate_hooks_run_as_soon_as_a_leaf_is_done(device):
    """An optimiser's step inside backward: each gradient can go before the next is there."""
    layers = [leaf([[1.0, 0.5], [0.5, 1.0]], device) for _ in range(4)]
    alive, order = [], []

    def step(p):
        alive.append(sum(q.grad is not None for q in layers))
        order.append(next(i for i, q in enumerate(layers) if q is p))
        with gpuad.no_grad():
            p.sub_(p.grad * 0.1)
        p.grad = None

    expected = []
    x = gpuad.ones(1, 2, device=device)
    y = x
    for p in [*layers, layers[2]]:  # the third is used twice
        y = y @ p
    for p, g in zip(layers, grad(y.sum(), layers, retain_graph=True), strict=True):
        expected.append(values_of(p.detach() - g * 0.1))
    for p in layers:
        p.register_post_accumulate_grad_hook(step)
    y.sum().backward()
    assert order == [3, 2, 1, 0] and alive == [1, 1, 1, 1]
    assert [values_of(p) for p in layers] == expected


def test_post_accumulate_hooks_with_inputs_and_grad(device):
    x, w = leaf([1.0], device), leaf([2.0], device)
    seen = []
    x.register_post_accumulate_grad_hook(lambda t: seen.append("x"))
    w.register_post_accumulate_grad_hook(lambda t: seen.append("w"))
    y = (x * w * w).sum()
    y.backward(inputs=[w], retain_graph=True)
    assert seen == ["w"] and x.grad is None and values_of(w.grad) == [4.0]
    grad(y, [x, w], retain_graph=True)
    assert seen == ["w"]
    y.backward(create_graph=True)
    assert sorted(seen) == ["w", "w", "x"] and values_of(w.grad) == [8.0] and x.grad.requires_grad


def test_hooks_of_one_example_see_its_gradient(device):
    x = gpuad.randn(3, 4, dtype="float64", device=device)
    seen = []

    def f(x, hook):
        y = x.sin()
        if y.requires_grad:
            y.register_hook(hook)
        return (y * y).sum()

    def normed(g):
        seen.append(g.shape)
        return g / g.norm()

    for derivative in (gpuad.func.grad, lambda f: gpuad.func.jacrev(gpuad.func.jacrev(f))):
        found = gpuad.func.vmap(derivative(lambda x: f(x, normed)))(x)
        expected = gpuad.stack([derivative(lambda x: f(x, normed))(each) for each in x])
        assert (found - expected).abs().max().item() < 1e-12
    assert set(seen) == {(4,)}
    seen.clear()
    hessian = gpuad.func.hessian(lambda x: f(x, lambda g: seen.append(g.shape)))(x[0])
    assert (hessian - gpuad.diag(2 * (2 * x[0]).cos())).abs().max().item() < 1e-12
    assert seen
    with pytest.raises(AutogradError, match="'normed' returned a gradient for a tensor that has a tangent"):
        gpuad.func.hessian(lambda x: f(x, normed))(x[0])


@pytest.mark.filterwarnings("error:vmap loops")
def test_full_backward_hooks_inside_vmap(device):
    layer, seen = nn.Linear(4, 2).to(device), []
    layer.register_full_backward_hook(lambda module, gi, go: seen.append((gi[0].shape, go[0].shape)))
    x = gpuad.randn(3, 4, device=device)
    gpuad.func.vmap(gpuad.func.grad(lambda x: layer(x).square().sum()))(x)
    assert len(seen) == 1
