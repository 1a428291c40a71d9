"""vmap: every op against a loop over the examples, alone and under derivatives; randomness, structures and refusals."""

from __future__ import annotations

import warnings
import zlib

import numpy as np
import pytest
from test_ops import EVERYTHING, draw, host, ident, place, resolve

import gpuad
from gpuad import Tensor, nn
from gpuad.autograd.op import table
from gpuad.autograd.primitive import Primitive
from gpuad.errors import AutogradError, ShapeError
from gpuad.func import (
    functional_call,
    grad,
    hessian,
    hvp,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    value_and_grad,
    vjp,
    vmap,
)
from gpuad.ops.samples import S

COUNT = 3
NO_WARNINGS = pytest.mark.filterwarnings("error:vmap has no batching rule")
IN_PLACE = ("assignment", "in-place arithmetic")  # write into a tensor that must have the examples too


class Examples:
    """One sample of an op, drawn COUNT times; `tensors` are its operands with all examples, along dimension 0."""

    def __init__(self, op, sample: tuple, device) -> None:
        self.op = op
        entries, params = (sample[:-1], sample[-1]) if isinstance(sample[-1], dict) else (sample, {})
        self.params = {k: resolve(v, device) for k, v in params.items()}
        generator = np.random.default_rng(zlib.crc32(repr((op.name, sample)).encode()))
        self.entries = [x if isinstance(x, S) else resolve(x, device) for x in entries]
        self.places = [i for i, x in enumerate(entries) if isinstance(x, S)]
        self.floating = [i for i in self.places if entries[i].kind == "float"]
        self.tensors = [
            place(np.stack([draw(entries[i], generator) for _ in range(COUNT)]), device, np.float64)
            for i in self.places
        ]

    def __call__(self, *moving: Tensor):
        """All outputs for given operands, a tuple."""
        inputs = list(self.entries)
        for i, x in zip(self.places, moving, strict=True):
            inputs[i] = x
        result = self.op(*inputs, **self.params)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def dims(self) -> list[tuple]:
        """Which operands have examples: all of them, and each alone."""
        count = len(self.places)
        if self.op.name in IN_PLACE or count == 1:
            return [(0,) * count] if count else []
        return [(0,) * count, *(tuple(0 if k == i else None for k in range(count)) for i in range(count))]


def operands(tensors, dims, i=None):
    """What in_dims=dims takes of the tensors of all examples: all, or only example i; what is shared is example 0."""
    return [x[0] if d is None else x if i is None else x[i] for x, d in zip(tensors, dims, strict=True)]


def assert_same(got, expected, tolerance: float = 1e-12) -> None:
    assert (tuple(got.shape), got.dtype) == (tuple(expected.shape), expected.dtype)
    assert got.device == expected.device
    np.testing.assert_allclose(host(got), host(expected), rtol=tolerance, atol=tolerance)


def stacked(results) -> tuple:
    return tuple(gpuad.stack(each) for each in zip(*results, strict=True))


@NO_WARNINGS
@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_vmap_is_the_loop(op, device):
    for sample in op.samples:
        case = Examples(op, sample, device)
        for dims in case.dims():
            got = vmap(lambda *xs, case=case: case(*xs), in_dims=dims)(*operands(case.tensors, dims))
            expected = stacked([case(*operands(case.tensors, dims, i)) for i in range(COUNT)])
            for a, b in zip(got, expected, strict=True):
                assert_same(a, b)


@NO_WARNINGS
@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_vmap_of_derivatives_is_the_loop(op, device):
    """vmap(vjp) and vmap(jvp), with all operands of examples and with one, against one example after the other."""
    for sample in op.samples[:3]:
        case = Examples(op, sample, device)
        outs = [y for y in case(*operands(case.tensors, (0,) * len(case.places), 0)) if y.is_floating_point()]
        if not outs or not case.floating or not all(y.numel() for y in outs):
            continue
        moving = [case.places.index(i) for i in case.floating]
        generator = np.random.default_rng(1)
        us = [place(generator.standard_normal((COUNT, *y.shape)), y.device, np.float64) for y in outs]
        vs = [place(generator.standard_normal(case.tensors[k].shape), device, np.float64) for k in moving]

        def both(operands_, vs, us, case=case, moving=moving):
            def of(*xs):
                inputs = list(operands_)
                for k, x in zip(moving, xs, strict=True):
                    inputs[k] = x
                return [y for y in case(*inputs) if y.is_floating_point()]

            primals = tuple(operands_[k] for k in moving)
            _, pull_back = vjp(of, *primals)
            return (*pull_back([u.to(y.dtype) for u, y in zip(us, of(*primals))]), *jvp(of, primals, tuple(vs))[1])

        for dims in case.dims()[:2]:
            got = vmap(both, in_dims=(list(dims), 0, 0))(operands(case.tensors, dims), vs, us)
            expected = stacked(
                [both(operands(case.tensors, dims, i), [v[i] for v in vs], [u[i] for u in us]) for i in range(COUNT)]
            )
            for a, b in zip(got, expected, strict=True):
                assert_same(a, b, 1e-10)


@NO_WARNINGS
@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_jacobians_of_both_modes_agree(op, device):
    """jacrev = jacfwd, first and (of one output) second derivatives, each by vmap."""
    for sample in op.samples[:2]:
        case = Examples(op, sample, device)
        given = operands(case.tensors, (0,) * len(case.places), 0)
        moving = [case.places.index(i) for i in case.floating]
        if not moving:
            continue

        def of(*xs, case=case, given=given, moving=moving):
            inputs = list(given)
            for k, x in zip(moving, xs, strict=True):
                inputs[k] = x
            return [y for y in case(*inputs) if y.is_floating_point()]

        primals = tuple(given[k] for k in moving)
        numbers = tuple(range(len(moving)))
        for back, forth in zip(jacrev(of, numbers)(*primals), jacfwd(of, numbers)(*primals), strict=True):
            for a, b in zip(back, forth, strict=True):
                assert_same(a.to(b.device), b, 1e-10)  # by reverse mode it is where the input is


def test_every_primitive_of_the_table_has_a_rule():
    from gpuad.autograd.batching import without_rule

    assert [op.name for op in table.values() if isinstance(op, Primitive) and op.batch_rule is without_rule] == []


def test_an_op_without_a_rule_is_looped_over_with_one_warning():
    from gpuad.autograd.primitive import linear

    doubled = Primitive("doubled for this test", lambda backend, input: input + input, jvp=linear,
                        vjp={"input": lambda g: g * 2}, register=False)  # fmt: skip
    x = gpuad.randn(4, 3)
    with pytest.warns(UserWarning, match="no batching rule for doubled for this test and loops over the 4 examples"):
        got = vmap(doubled)(x)
    assert_same(got, x * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(vmap(grad(lambda x: doubled(x).square().sum()))(x), 8 * x, 1e-6)


# Composition ----------------------------------------------------------------------------------------------------------


def mlp(device):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(device).double()
    return model, {k: p.detach() for k, p in model.named_parameters()}


@NO_WARNINGS
def test_per_sample_gradients_of_an_mlp(device):
    model, parameters = mlp(device)
    x = gpuad.randn(4, 3, dtype="float64", device=device)
    y = gpuad.tensor([0, 1, 1, 0], device=device)

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(4):
        expected = grad(loss)(parameters, x[i], y[i])
        for name in expected:
            assert_same(got[name][i], expected[name])
    for name, p in parameters.items():
        assert got[name].shape == (4, *p.shape)
        assert not got[name].requires_grad


@NO_WARNINGS
@pytest.mark.parametrize("transform", [grad, hessian, jacrev, jacfwd], ids=lambda f: f.__name__)
def test_vmap_of_transforms_of_an_mlp(device, transform):
    model, _ = mlp(device)
    x = gpuad.randn(4, 3, dtype="float64", device=device)

    def f(x):
        return model(x).square().sum()

    got = vmap(transform(f))(x)
    assert_same(got, gpuad.stack([transform(f)(each) for each in x]).detach())


def test_hessian_is_symmetric_and_what_every_mix_of_modes_gives(device):
    model, _ = mlp(device)
    x, v = (gpuad.randn(3, dtype="float64", device=device) for _ in range(2))

    def f(x):
        return model(x).exp().sum() * x[0]

    h = hessian(f)(x).detach()
    assert_same(h, h.T)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert_same(outer(inner(f))(x).detach(), h)
    assert_same(hvp(f, x, v).detach(), h @ v)
    assert_same(jacfwd(hessian(f))(x).detach(), jacrev(hessian(f))(x).detach())


@NO_WARNINGS
def test_vmap_nests_with_itself_and_with_derivatives(device):
    x = gpuad.randn(3, 4, dtype="float64", device=device)
    y = gpuad.randn(2, 4, dtype="float64", device=device)

    def f(x, y):
        return (x * y).sin().sum() * x[0]

    pairs = vmap(vmap(f, (None, 0)), (0, None))
    expected = gpuad.stack([gpuad.stack([f(a, b) for b in y]) for a in x])
    assert_same(pairs(x, y), expected)
    assert_same(
        grad(lambda x: pairs(x, y).sum())(x), gpuad.stack([grad(lambda a: sum(f(a, b) for b in y))(a) for a in x])
    )
    got = vmap(vmap(grad(f), (None, 0)), (0, None))(x, y)
    assert_same(got, gpuad.stack([gpuad.stack([grad(f)(a, b) for b in y]) for a in x]))
    got = vmap(vmap(hessian(f), (None, 0)), (0, None))(x, y)
    assert_same(got, gpuad.stack([gpuad.stack([hessian(f)(a, b) for b in y]) for a in x]))
    got = jacfwd(lambda x: vmap(vmap(grad(f), (None, 0)), (0, None))(x, y))(x)
    assert_same(got, jacrev(lambda x: vmap(vmap(grad(f), (None, 0)), (0, None))(x, y))(x))


def test_a_gradient_through_vmap_reaches_what_the_examples_share(device):
    w = gpuad.randn(4, 4, dtype="float64", device=device, requires_grad=True)
    x = gpuad.randn(3, 4, dtype="float64", device=device)
    (got,) = gpuad.autograd.grad(vmap(lambda x: (w @ x).tanh())(x).sum(), [w])
    (expected,) = gpuad.autograd.grad((x @ w.T).tanh().sum(), [w])
    assert_same(got, expected)


def test_an_ensemble_by_stack_module_state(device):
    models = [nn.Linear(3, 2).to(device).double() for _ in range(4)]
    x = gpuad.randn(5, 3, dtype="float64", device=device)
    parameters, buffers = stack_module_state(models)
    got = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), (0, 0, None))(parameters, buffers, x)
    assert_same(got.detach(), gpuad.stack([m(x) for m in models]).detach())
    with pytest.raises(ValueError, match="all of the same class"):
        stack_module_state([models[0], nn.ReLU()])


def test_functional_call_leaves_the_module_as_it_was():
    model = nn.Linear(3, 2)
    weight = model.weight
    functional_call(model, {"weight": gpuad.zeros(2, 3)}, gpuad.ones(3))
    assert model.weight is weight
    with pytest.raises(KeyError, match="no such parameter or buffer; it has weight, bias"):
        functional_call(model, {"wait": gpuad.zeros(2, 3)}, gpuad.ones(3))


@pytest.mark.parametrize("in_dim, out_dim", [(0, 0), (1, 2), (-1, -1), (2, 1)])
def test_in_dims_and_out_dims(in_dim, out_dim):
    x = gpuad.randn(3, 4, 5)
    got = vmap(lambda x: x.sin() * x.sum(), in_dim, out_dim)(x)
    parts = [p.squeeze(in_dim) for p in x.split(1, in_dim)]
    assert_same(got, gpuad.stack([p.sin() * p.sum() for p in parts], out_dim), 1e-6)


def test_structures_of_arguments_and_results():
    x, y = gpuad.randn(3, 2), gpuad.randn(2, 3)

    def f(tree, scale):
        return {"sum": tree["a"] + tree["b"][0], "rest": [tree["a"].max(0), scale]}

    got = vmap(f, in_dims=({"a": 0, "b": 1}, None), out_dims={"sum": 1, "rest": 0})(
        {"a": x, "b": [y]}, gpuad.tensor(2.0)
    )
    assert_same(got["sum"], (x + y.T).T)
    assert_same(got["rest"][0].values, x.max(1).values)
    assert_same(got["rest"][1], gpuad.full((3,), 2.0))


def test_chunks_are_the_whole():
    x = gpuad.randn(7, 3)
    assert_same(vmap(lambda x: x.softmax(0), chunk_size=2)(x), x.softmax(1), 1e-6)
    f = lambda x: x.sin() * x.sum()  # noqa: E731
    assert_same(jacrev(f, chunk_size=2)(x[0]), jacfwd(f)(x[0]), 1e-6)


def test_dtypes_are_those_of_one_example():
    """A float64 number for each example does not widen float32 vectors, as one 0-d tensor does not."""
    x, s = gpuad.randn(3, 4), gpuad.randn(3, dtype="float64")
    assert vmap(lambda x, s: x * s)(x, s).dtype == gpuad.float32
    assert vmap(lambda s: s * 2)(s).dtype == gpuad.float64


@pytest.mark.parametrize("transform", [lambda f: f, jacfwd, hessian], ids=["value", "jacfwd", "hessian"])
def test_tensors_like_one_of_many_take_many_in_place(transform):
    x = gpuad.randn(2, 3, dtype="float64")

    def f(x, out):
        out[0] = x[1] * x[2]
        out[1:].add_(x[:2] * 2)
        return (out * out).sum()

    def g(x):
        return (x[1] * x[2]) ** 2 + ((x[:2] * 2) ** 2).sum()

    for like in (gpuad.zeros_like, lambda x: gpuad.zeros(3, dtype="float64") + 0 * x.sum()):
        assert_same(vmap(transform(lambda x, like=like: f(x, like(x))))(x), gpuad.stack([transform(g)(a) for a in x]))
    with pytest.raises(AutogradError, match="many examples of vmap .* start from one that has them: gpuad.zeros_like"):
        vmap(transform(lambda x: f(x, gpuad.zeros(3, dtype="float64"))))(x)


def test_no_examples_at_all():
    assert vmap(lambda x: x.sin().sum())(gpuad.zeros(0, 3)).shape == (0,)


@NO_WARNINGS
def test_indices_that_differ_between_examples(device):
    x = gpuad.randn(3, 4, 5, dtype="float64", device=device)
    i = gpuad.tensor([[0, 2], [3, 3], [1, -1]], device=device)
    keys = [lambda i: (i,), lambda i: (slice(None), i), lambda i: (i, 2), lambda i: (i, slice(1, 3)),
            lambda i: (i, i), lambda i: (None, i), lambda i: (i, None, i), lambda i: (Ellipsis, i),
            lambda i: (i[0],), lambda i: (i[0], i)]  # fmt: skip
    for key in keys:
        for dims in ((0, 0), (None, 0), (0, None)):
            xs, js = operands((x, i), dims), [operands((x, i), dims, k) for k in range(3)]
            got = vmap(lambda x, i, key=key: x[key(i)], dims)(*xs)
            assert_same(got, gpuad.stack([a[key(b)] for a, b in js]))
            got = vmap(grad(lambda x, i, key=key: x[key(i)].exp().sum()), dims)(*xs)
            assert_same(got, gpuad.stack([grad(lambda a, b, key=key: a[key(b)].exp().sum())(a, b) for a, b in js]))

            def put(x, i, key=key):
                y = x * 1
                y[key(i)] = x[key(i)] * 2 + 1
                return y

            if dims[0] == 0:
                got, expected = vmap(put, dims)(*xs), gpuad.stack([put(a, b) for a, b in js])
                assert_same(got, expected)


def test_masks_and_choices_that_differ_between_examples(device):
    x = gpuad.randn(3, 4, dtype="float64", device=device)

    def clipped(x):
        y = x * 1
        y[x < 0] = 0.0
        return y

    assert_same(vmap(clipped)(x), x.relu())
    assert_same(vmap(lambda x: gpuad.where(x > 0, x, 0.0))(x), x.relu())
    with pytest.raises(ShapeError, match="a bool mask cannot be an index"):
        vmap(lambda x: x[x > 0])(x)
    hot = vmap(lambda i: nn.functional.one_hot(i, 4))(gpuad.tensor([1, 3], device=device))
    assert host(hot).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


# Randomness -----------------------------------------------------------------------------------------------------------


DRAWS = {
    "rand": lambda x: gpuad.rand(4) + x * 0, "randn_like": lambda x: gpuad.randn_like(x),
    "randint": lambda x: gpuad.randint(0, 1000, (4,)), "randperm": lambda x: gpuad.randperm(20),
    "normal": lambda x: gpuad.normal(1.0, 2.0, (4,)), "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "bernoulli": lambda x: gpuad.bernoulli(gpuad.full((20,), 0.5)), "normal_": lambda x: (x * 0).normal_(),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_randomness(name):
    x = gpuad.ones(3, 20) if name == "dropout" else gpuad.ones(3, 4)
    with pytest.raises(AutogradError, match="randomness='different'"):
        vmap(DRAWS[name])(x)
    different = host(vmap(DRAWS[name], randomness="different")(x))
    assert different.shape[0] == 3
    assert not (different[0] == different[1]).all()
    assert not (different[1] == different[2]).all()
    if name != "normal_":  # the same numbers cannot be told from one example's where they are written in place
        same = host(vmap(DRAWS[name], randomness="same")(x))
        assert (same == same[0]).all()


# Refusals -------------------------------------------------------------------------------------------------------------


def test_values_are_not_to_be_had_inside():
    x = gpuad.randn(3, 4)
    for read in (lambda x: x.sum().item(), lambda x: x if x.sum() > 0 else -x, lambda x: x.numpy(),
                 lambda x: x.nonzero(), lambda x: x.tolist(), lambda x: np.asarray(x)):  # fmt: skip
        with pytest.raises(AutogradError, match="Inside vmap a tensor stands for many examples"):
            vmap(read)(x)


def test_tensors_with_levels_print_what_they_are():
    seen = []
    vmap(lambda x: (seen.append(repr(x)), x)[1])(gpuad.randn(3, 4))
    jvp(lambda x: (seen.append(repr(x)), x)[1], (gpuad.tensor(1.0),), (gpuad.tensor(2.0),))
    assert seen == ["<one of 3 examples of vmap: float32 (4,) on cpu>", "dual(tensor(1.), tangent=tensor(2.))"]


def test_tensors_do_not_outlive_vmap():
    kept = []
    vmap(lambda x: (kept.append(x), x.sin())[1])(gpuad.randn(3, 4))
    with pytest.raises(AutogradError, match="no use after vmap has returned"):
        kept[0] * 2
    with pytest.raises(AutogradError, match="no use after vmap has returned"):
        vmap(lambda x: x * kept[0])(gpuad.randn(3, 4))


def test_bad_arguments():
    x = gpuad.randn(3, 4)
    with pytest.raises(ShapeError, match=r"as many examples in every argument, got 3 .*, 4 "):
        vmap(lambda x, y: x)(x, x.T)
    with pytest.raises(ShapeError, match=r"in_dims=2 for a tensor of shape \(3, 4\)"):
        vmap(lambda x: x, 2)(x)
    with pytest.raises(TypeError, match="in_dims=0 for a float, which has no dimensions; give None"):
        vmap(lambda x, s: x)(x, 2.0)
    with pytest.raises(ValueError, match="does not fit the structure"):
        vmap(lambda x, y: x, (0,))(x, x)
    with pytest.raises(ValueError, match="None for all of them"):
        vmap(lambda x: x, None)(x)
    with pytest.raises(TypeError, match="a function that returns a float"):
        vmap(lambda x: 1.0)(x)
    with pytest.raises(ValueError, match="out_dims of vmap is None for a result that differs"):
        vmap(lambda x: x, out_dims=None)(x)
    with pytest.raises(ValueError, match="randomness is one of"):
        vmap(lambda x: x, randomness="some")


def test_backward_and_shared_leaves_are_refused_inside():
    w = gpuad.randn(4, requires_grad=True)
    x = gpuad.randn(3, 4)
    with pytest.raises(AutogradError, match="gpuad.func.grad inside vmap"):
        vmap(lambda x: (w * x).sum().backward() or x)(x)
    with pytest.raises(AutogradError, match="a tensor from outside, which all examples share"):
        vmap(lambda x: gpuad.autograd.grad((w * x).sum(), [w])[0])(x)
    with pytest.raises(AutogradError, match="many examples of vmap .* in a tensor that has none"):
        vmap(lambda x: gpuad.zeros(4).add_(x))(x)


def test_value_and_grad_of_each_example():
    x = gpuad.randn(3, 4)
    (value, aux), gradient = vmap(value_and_grad(lambda x: (x.square().sum(), {"mean": x.mean()}), has_aux=True))(x)
    assert_same(value, x.square().sum(1), 1e-6)
    assert_same(aux["mean"], x.mean(1), 1e-6)
    assert_same(gradient, 2 * x, 1e-6)
