"""In-place changes of views: base, view and all other views follow on the tape, as if written out of place."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import gpuad
from gpuad.autograd import grad
from gpuad.errors import AutogradError, ShapeError


def leaf(values, device, dtype=None):
    return gpuad.tensor(values, device=device, dtype=dtype, requires_grad=True)


def values_of(tensor):
    return tensor.detach().cpu().tolist()


BASE = np.arange(1.0, 25.0).reshape(2, 3, 4) / 10

# Each view as a function of a tensor, and the same on an array of element numbers.
VIEWS = {
    "select": lambda x: x[1],
    "slice": lambda x: x[:, 1:3, ::2],
    "newaxis": lambda x: x[:, None, 0],
    "ellipsis": lambda x: x[..., 2],
    "narrow": lambda x: x.narrow(2, 1, 2),
    "transpose": lambda x: x.transpose(0, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: x.reshape(-1),
    "flatten": lambda x: x.flatten(1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[0:1].squeeze(0),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "split": lambda x: x.split(2, dim=2)[1],
    "chunk": lambda x: x.chunk(2)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "alias": lambda x: x.view(2, 3, 4),
    "chain": lambda x: x.permute(1, 2, 0)[1].T[:, 1:3],
    "element": lambda x: x[1, 2, 3],
    "deep": lambda x: x[1:].view(12)[2:10].view(2, 4).T[1:3].unsqueeze(0),
}  # fmt: skip


def place_of(name):
    """The element numbers that a view picks, by the same view of a tensor of numbers."""
    numbers = gpuad.arange(24.0, dtype="float64").reshape(2, 3, 4)
    return np.array(VIEWS[name](numbers).tolist()).astype(int)


@pytest.mark.parametrize("name", VIEWS)
def test_gradients_equal_those_out_of_place(device, name):
    """mul_ by a recorded weight on each kind of view, read through base, view and another view, to the second order."""
    place = place_of(name)
    weight = np.linspace(0.5, 2.0, place.size).reshape(place.shape)

    def in_place(x, w):
        y = x * 1.0
        other = y.reshape(-1)[::3]
        view = VIEWS[name](y)
        view.mul_(w)
        return (y * y).sum() + (view * view * view).sum() + other.exp().sum()

    def out_of_place(x, w):
        flat = x.reshape(-1)
        changed = gpuad.scatter(flat, 0, gpuad.tensor(place.reshape(-1), device=device),
                                flat[place.reshape(-1)] * w.reshape(-1))  # fmt: skip
        picked = changed[place.reshape(-1)]
        return (changed * changed).sum() + (picked * picked * picked).sum() + changed[::3].exp().sum()

    found, expected = [], []
    for results, function in ((found, in_place), (expected, out_of_place)):
        x, w = leaf(BASE, device, "float64"), leaf(weight, device, "float64")
        value = function(x, w)
        first = grad(value, [x, w], create_graph=True)
        second = grad(sum((g * g).sum() for g in first), [x, w])
        results.extend([value, *first, *second])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(values_of(a), values_of(b), rtol=1e-12)


def test_every_way_of_writing(device):
    x, w = leaf([1.0, 2.0, 3.0, 4.0], device), leaf([5.0, 6.0], device)
    y = x * 1
    y[:2].copy_(w)
    y[1:3][0] = w.sum()
    y[2:].add_(w, alpha=2)
    y.view(2, 2)[1][1].fill_(7.0)
    assert values_of(y) == [5.0, 11.0, 13.0, 7.0]
    y.sum().backward()
    assert values_of(x.grad) == [0.0, 0.0, 1.0, 0.0] and values_of(w.grad) == [1 + 1 + 2, 1.0]


def test_augmented_assignment_on_an_index(device):
    x = leaf([1.0, 2.0, 3.0], device)
    y = x * 2
    y[1] *= y[0]
    y[0] += 1
    (y * y).sum().backward()
    # y = (2a + 1, 4ab, 2c)
    assert values_of(x.grad) == [2 * 3 * 2 + 2 * 8 * 8.0, 2 * 8 * 4.0, 24.0]


def test_a_plain_tensor_joins_the_tape_with_all_of_its_views(device):
    w = leaf([1.0, 2.0, 3.0], device)
    buffer = gpuad.zeros(2, 3, device=device)
    whole, row, apart = buffer.view(6), buffer[1], buffer.detach()
    assert not whole.requires_grad
    buffer[0].copy_(w * w)
    assert buffer.requires_grad and whole.requires_grad and row.requires_grad and not apart.requires_grad
    row.copy_(w)
    assert values_of(whole) == [1.0, 4.0, 9.0, 1.0, 2.0, 3.0]
    (whole * whole).sum().backward()
    assert values_of(w.grad) == [4 * v**3 + 2 * v for v in (1.0, 2.0, 3.0)]


def test_views_follow_a_change_of_their_base(device):
    x = leaf([1.0, 2.0], device)
    y = x * 1
    view, nested = y[:1], y.view(2, 1)[1]
    before = view * 1
    y.mul_(3)
    (view.sum() + nested.sum() + before.sum()).backward()
    assert values_of(x.grad) == [3.0 + 1.0, 3.0]


def test_views_follow_an_assignment_to_their_base(device):
    x, w = leaf([1.0, 2.0], device), leaf([5.0], device)
    y = x * 1
    view = y[:1]
    y[:1] = w
    view.sum().backward()
    assert values_of(w.grad) == [1.0] and values_of(x.grad) == [0.0, 0.0]


def test_what_was_computed_before_keeps_its_gradient(device):
    x = leaf([1.0, 2.0], device)
    y = x * 1
    view = y[:1]
    before = view * 5
    view.mul_(3)
    after = view * 5
    (before.sum() + after.sum()).backward()
    assert values_of(x.grad) == [5.0 + 15.0, 0.0]


def test_gradients_of_base_and_view_themselves(device):
    x = leaf([1.0, 2.0], device)
    y = x * 1
    view = y[:1]
    view.mul_(3)
    loss = (view * view).sum()
    assert values_of(grad(loss, y, retain_graph=True)[0]) == [6.0, 0.0]
    assert values_of(grad(loss, view)[0]) == [6.0]


def test_hooks_and_retained_gradients(device):
    """Hooks stay with the value they were registered on; retain_grad() follows the tensor."""
    x = leaf([1.0, 2.0], device)
    y = x * 1
    view = y[:1]
    y.retain_grad()
    view.retain_grad()
    seen = []
    y.register_hook(lambda g: seen.append(values_of(g)))
    view.mul_(3)
    (y * 2).sum().backward()
    assert seen == [[6.0, 2.0]] and values_of(y.grad) == [2.0, 2.0] and view.grad is None
    y.grad = None
    z = x * 1
    z.retain_grad()
    z.mul_(3)
    z.sum().backward()
    assert values_of(z.grad) == [1.0, 1.0]


def test_versions(device):
    """One count for base and views: what is saved of any of them is protected, once each write."""
    x = leaf([1.0, 2.0], device)
    y = x * 1
    view = y[:1]
    before = y._version
    saved = y * y
    view.mul_(3)
    assert y._version == view._version == before + 1
    with pytest.raises(AutogradError, match="changed in place"):
        saved.sum().backward()
    view.exp_()  # saves its output, which is its value now
    y.sum().backward()
    other = x * 1
    part = other[:1]
    part.exp_()
    other[1:].mul_(2)
    with pytest.raises(AutogradError, match="changed in place"):
        other.sum().backward()


def test_base_of_another_layout(device):
    """Views by strides: the base is not C-contiguous, so a C-ordered copy would not have the same views."""
    w = leaf([2.0, 3.0], device, "float64")
    base = gpuad.ones(4, 3, device=device, dtype="float64").T.detach()
    assert not base.is_contiguous()
    base.T.view(-1)[2:4].mul_(w)
    expected = np.ones(12)
    expected[2:4] = [2.0, 3.0]
    np.testing.assert_array_equal(values_of(base), expected.reshape(4, 3).T)
    (base * base).sum().backward()
    assert values_of(w.grad) == [4.0, 6.0]


def test_leaves_and_their_views_are_refused(device):
    x = leaf([1.0, 2.0], device)
    for write in (lambda: x[:1].mul_(2), lambda: x.view(2, 1).T.add_(1), lambda: x[:1].__setitem__(0, 3.0)):
        with pytest.raises(AutogradError, match=r"view of a leaf that requires grad.*no_grad\(\)"):
            write()
    assert values_of(x) == [1.0, 2.0]
    with gpuad.no_grad():
        x[:1].mul_(2)
    assert values_of(x) == [2.0, 2.0] and x._version == 1


def test_a_view_of_a_leaf_that_takes_a_recorded_value_is_refused(device):
    x, w = gpuad.zeros(2, device=device), leaf([1.0], device)
    view = x[:1]
    x.requires_grad_()
    with pytest.raises(AutogradError, match="view of a leaf"):
        view.copy_(w)


def test_views_made_without_recording_are_refused(device):
    x, w = leaf([1.0, 2.0], device), leaf([3.0], device)
    y = x * 1
    with gpuad.no_grad():
        view = y[:1]
    with pytest.raises(AutogradError, match=r"made inside no_grad\(\)"):
        view.mul_(w)
    with gpuad.no_grad():
        view.mul_(w)
    assert values_of(y) == [3.0, 2.0]


def test_expanded_views_are_refused(device):
    w = leaf([1.0, 2.0, 3.0], device)
    x = gpuad.zeros(1, device=device)
    for view in (x.expand(3), x.expand(3, 3)[1]):
        with pytest.raises(ShapeError, match=r"expanded.*clone\(\)"):
            view.copy_(w)


def test_what_a_function_returns_as_it_is_refused(device):
    class Same(gpuad.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, g):
            return g

    y = Same.apply(leaf([1.0], device) * 1)
    with pytest.raises(AutogradError, match=r"Function's arguments.*clone\(\)"):
        y.mul_(2)


def test_detaching_a_view_in_place_is_refused(device):
    y = leaf([1.0, 2.0], device) * 1
    with pytest.raises(AutogradError, match=r"x\.detach\(\)"):
        y[:1].detach_()
    y.detach_()
    assert not y.requires_grad


def test_random_fill_on_the_tape(device):
    """What was there before takes no gradient any more."""
    x = leaf([1.0, 2.0], device)
    y = x * 1
    y[:1].normal_()
    y[1:].mul_(3)
    y.sum().backward()
    assert values_of(x.grad) == [0.0, 3.0]


def test_a_copy_is_no_view(device):
    """reshape() that had to copy: a write to it leaves the tensor alone."""
    x, w = leaf([[1.0, 2.0], [3.0, 4.0]], device), leaf([1.0, 2.0, 3.0, 4.0], device)
    y = x * 1
    copied = y.T.reshape(-1)
    copied.mul_(w)
    assert values_of(y) == [[1.0, 2.0], [3.0, 4.0]]
    (y.sum() + copied.sum()).backward()
    assert values_of(x.grad) == [[2.0, 4.0], [3.0, 5.0]]


def test_replaced_data_ends_a_view(device):
    x, w = leaf([1.0, 2.0], device), leaf([3.0], device)
    y = x * 1
    view = y[:1]
    view.data = gpuad.ones(1, device=device)
    view.mul_(w)
    assert values_of(y) == [1.0, 2.0] and values_of(view) == [3.0]
    view.sum().backward()
    assert values_of(w.grad) == [1.0]


def test_diagonal_is_a_view(device):
    x = gpuad.zeros(2, 3, 4, device=device)
    for offset in (-3, -1, 0, 2, 5):
        expected = np.diagonal(np.arange(24).reshape(2, 3, 4), offset, 1, 2)
        found = gpuad.arange(24, device=device).reshape(2, 3, 4).diagonal(offset, 1, 2)
        assert values_of(found) == expected.tolist()
    x.diagonal(1, 1, 2).fill_(1.0)
    assert values_of(x) == [np.eye(3, 4, 1).tolist()] * 2


def test_rows_written_in_a_loop(device):
    """A recurrence kept in one buffer: h[t + 1] = tanh(w h[t])."""
    w = leaf([0.5, -0.3], device)
    h = gpuad.zeros(6, 2, device=device)
    h[0].fill_(1.0)
    for t in range(5):
        h[t + 1].copy_((h[t].clone() * w).tanh())
    (found,) = grad(h.sum(), w)
    state, total = gpuad.ones(2, device=device), 0
    for _ in range(5):
        state = (state * w).tanh()
        total = total + state.sum()
    np.testing.assert_allclose(values_of(found), values_of(grad(total, w)[0]), rtol=1e-5)


def test_views_are_not_kept_alive(device):
    """The list of views of a long-lived tensor stays short, and makes no cycles."""
    x = gpuad.zeros(4, device=device)
    gc.collect()
    gc.disable()
    try:
        for _ in range(1000):
            view = x[:2]
        assert len(x._cell) < 200
        alive, base = weakref.ref(view), weakref.ref(x)
        view.copy_(leaf([1.0, 2.0], device))
        del view, x
        assert alive() is None and base() is None
    finally:
        gc.enable()


TRANSFORMS = {
    "jvp": lambda f: lambda x: gpuad.func.jvp(f, (x,), (x * x,))[1],
    "jacfwd": gpuad.func.jacfwd,
    "hessian": lambda f: gpuad.func.hessian(lambda x: (f(x) * x).sum()),
    "hvp": lambda f: lambda x: gpuad.func.hvp(lambda x: (f(x) * x).sum(), x, x * x),
    "reverse over forward": lambda f: gpuad.func.jacrev(gpuad.func.jacfwd(f)),
}


@pytest.mark.parametrize("batched", [False, True], ids=["one", "vmap"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_views_under_transforms(device, name, batched):
    """Writes to views, to their base and to views of views, read through all of them."""

    def in_place(x):
        y = x * 1
        whole, part = y.view(2, 2), y[1:3]
        y[0] = x[1] * x[2]
        part.mul_(x[3])
        whole[1].exp_()
        whole.T[0].add_(part)
        y += x
        return y + whole.reshape(-1) * y.flip(0)

    def out_of_place(x):
        a, b, c, d = x[1] * x[2], x[1] * x[3], x[2] * x[3], x[3]
        c, d = c.exp(), d.exp()
        a, c = a + b, c + c
        y = gpuad.stack([a, b, c, d]) + x
        return y + y * y.flip(0)

    x = gpuad.tensor([[0.5, -0.3, 0.8, 0.2], [0.1, 0.4, -0.6, 0.9]], dtype="float64", device=device)
    of = TRANSFORMS[name]
    found = gpuad.func.vmap(of(in_place))(x) if batched else of(in_place)(x[0])
    expected = gpuad.stack([of(out_of_place)(each) for each in x]) if batched else of(out_of_place)(x[0])
    np.testing.assert_allclose(values_of(found), values_of(expected), rtol=1e-12, atol=1e-12)


def test_a_plain_tensor_takes_tangents_in_place(device):
    x, v = gpuad.tensor([1.0, 2.0], device=device), gpuad.tensor([3.0, 4.0], device=device)
    buffer = gpuad.zeros(3, device=device)

    def f(x):
        out = gpuad.zeros(3, device=device)
        view = out[1:]
        out[0] = x[0] * x[1]
        view.add_(x)
        buffer.add_(out)
        return out * view[0]

    value, tangent = gpuad.func.jvp(f, (x,), (v,))
    assert values_of(value) == [2.0, 1.0, 2.0] and values_of(tangent) == [10.0 + 2 * 3, 3.0 + 3, 4.0 + 2 * 3]
    assert values_of(buffer) == [2.0, 1.0, 2.0]
    assert type(buffer) is gpuad.Tensor  # the level is closed
    assert values_of(buffer * 2) == [4.0, 2.0, 4.0]
    with pytest.raises(ShapeError, match="expanded tensor"):
        gpuad.func.jvp(lambda x: x.sum().expand(2).mul_(x), (x,), (v,))


def test_requires_grad_inside_transforms(device):
    """autograd.grad with requires_grad_() inside jvp and vmap; the tensors outside are left alone."""
    x = gpuad.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)

    def slope(x):
        x.requires_grad_()
        return grad((x * x * x).sum(), [x])[0]

    assert values_of(gpuad.func.vmap(slope)(x)) == values_of(3 * x * x)
    assert values_of(gpuad.func.jvp(slope, (x,), (x,))[1]) == values_of(6 * x * x)
    assert not x.requires_grad
