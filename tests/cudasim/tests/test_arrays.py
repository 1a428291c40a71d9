"""Array operations against NumPy."""

import cupy as cp
import numpy as np
import pytest

rng = np.random.default_rng(0)
DTYPES = [
    "float16",
    "float32",
    "float64",
    "int8",
    "int32",
    "int64",
    "uint8",
    "uint32",
    "bool",
    "complex64",
    "complex128",
]


def sample(shape, dtype):
    dtype = np.dtype(dtype)
    a = rng.standard_normal(shape) * 4
    if dtype.kind == "c":
        a = a + 1j * rng.standard_normal(shape)
    if dtype.kind in "iu":
        a = np.abs(a) + 1 if dtype.kind == "u" else a * 3
    if dtype.kind == "b":
        a = a > 0
    return a.astype(dtype)


def same(got, want, rtol=1e-5, atol=1e-6):
    assert isinstance(got, cp.ndarray)
    assert got.dtype == np.asarray(want).dtype
    assert got.shape == np.shape(want)
    if got.dtype == np.float16:
        rtol, atol = 2e-2, 1e-2
    np.testing.assert_allclose(got.get(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["add", "multiply", "equal", "maximum"])
def test_binary(op, dtype):
    a, b = sample((3, 4, 5), dtype), sample((4, 1), dtype)
    same(getattr(cp, op)(cp.asarray(a), cp.asarray(b)), getattr(np, op)(a, b))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "op",
    [
        "exp",
        "sin",
        "tanh",
        "sqrt",
        "floor",
        "sign",
        "abs",
        "square",
        "negative",
        "log1p",
        "arctan",
        "isnan",
        "rint",
        "reciprocal",
    ],
)
def test_unary(op, dtype):
    a = np.abs(sample((7, 3), dtype)) + np.dtype(dtype).type(0.5)
    same(getattr(cp, op)(cp.asarray(a)), getattr(np, op)(a))


@pytest.mark.parametrize("op", ["exp", "sqrt", "conj", "abs", "angle", "log", "sin"])
def test_complex(op):
    a = sample((5,), "complex128")
    same(getattr(cp, op)(cp.asarray(a)), getattr(np, op)(a))


def test_python_operators():
    a = sample((6,), "int32")
    b = np.array([1, 2, 3, -2, 5, 7], "int32")
    x, y = cp.asarray(a), cp.asarray(b)
    for got, want in [
        (x // y, a // b),
        (x % y, a % b),
        (x / y, a / b),
        (x << 2, a << 2),
        (x & y, a & b),
        (x ^ y, a ^ b),
        (~x, ~a),
        (x**2, a**2),
        (x > y, a > b),
    ]:
        same(got, want)


def test_integer_division_by_zero_does_not_crash():
    cp.asarray([1, 2, 3]) // cp.asarray([0, 1, 0])
    cp.ElementwiseKernel("int32 a, int32 b", "int32 c", "c = a / b", "raw_division")(
        cp.arange(4, dtype="i"), cp.zeros(4, "i")
    )


def test_views_and_indexing():
    a = sample((4, 5, 6), "float32")
    x = cp.asarray(a)
    i, j = np.array([0, 2, 3, 2]), np.array([1, 1, 4, 0])
    mask = a > 0
    for f in [
        lambda t, c: t[1:3, ::2, ::-1],
        lambda t, c: t.transpose(2, 0, 1),
        lambda t, c: t[..., None, 2],
        lambda t, c: t.swapaxes(0, 2).reshape(-1, 4),
        lambda t, c: t[c(i), c(j)],
        lambda t, c: t[c(i)],
        lambda t, c: t[:, c(j)],
        lambda t, c: t[c(mask)],
        lambda t, c: t[c(mask[:, 0, 0])],
        lambda t, c: t.ravel(),
    ]:
        same(f(x, cp.asarray), f(a, np.asarray))
    a[i, j] = 7
    x[cp.asarray(i), cp.asarray(j)] = 7
    a[a < 0] = 0
    x[x < 0] = 0
    a[:, 1:3] += 1
    x[:, 1:3] += 1
    same(x, a)


def test_scatter_add():
    import cupyx

    i = np.array([0, 1, 1, 3, 3, 3])
    for dtype in ("float32", "float64", "int32", "float16"):
        a, b = np.zeros((5, 2), dtype), np.ones((6, 2), dtype)
        want = a.copy()
        np.add.at(want, i, b)
        x = cp.asarray(a)
        cupyx.scatter_add(x, cp.asarray(i), cp.asarray(b))
        same(x, want)
        y = cp.asarray(a)
        cp.add.at(y, cp.asarray(i), cp.asarray(b))
        same(y, want)


def test_shaping():
    a, b = sample((3, 4), "float32"), sample((3, 4), "float32")
    for f in [
        lambda m, p, q: m.where(p > q, p, q),
        lambda m, p, q: m.clip(p, -1, 1),
        lambda m, p, q: m.concatenate([p, q], 1),
        lambda m, p, q: m.stack([p, q], 1),
        lambda m, p, q: m.pad(p, ((1, 2), (0, 1))),
        lambda m, p, q: m.repeat(p, 2, 0),
        lambda m, p, q: m.tile(p, (2, 1)),
        lambda m, p, q: m.roll(p, 2),
        lambda m, p, q: m.take(p, m.asarray([0, 2, 3]), 1),
        lambda m, p, q: m.tril(p),
        lambda m, p, q: m.broadcast_to(p[:, :1], (3, 4)),
        lambda m, p, q: m.eye(3, 4) + p,
        lambda m, p, q: m.diff(p),
        lambda m, p, q: m.meshgrid(p[0], q[1])[1],
        lambda m, p, q: m.nonzero(p > 0)[0],
        lambda m, p, q: m.flip(p, 1),
    ]:
        same(f(cp, cp.asarray(a), cp.asarray(b)), f(np, a, b))
    for got, want in zip(cp.split(cp.asarray(a), 2, 1), np.split(a, 2, 1)):
        same(got, want)


@pytest.mark.parametrize("axis", [None, 0, 1, 2, (0, 2)])
@pytest.mark.parametrize("op", ["sum", "mean", "max", "min", "prod", "var", "std", "any", "all"])
def test_reductions(op, axis):
    a = sample((5, 33, 7), "float64") / 4
    same(getattr(cp, op)(cp.asarray(a), axis=axis, keepdims=True), getattr(np, op)(a, axis=axis, keepdims=True))


def test_reductions_more():
    a = sample((1000, 70), "float32")
    x = cp.asarray(a)
    same(x.sum(), a.sum(), rtol=1e-3)
    same(x.sum(0), a.sum(0), rtol=1e-3, atol=1e-3)
    same(x.sum(1), a.sum(1), rtol=1e-3, atol=1e-3)
    same(x.argmax(1), a.argmax(1))
    same(x.argmin(), a.argmin())
    same(cp.cumsum(x, 1), np.cumsum(a, 1), rtol=1e-3, atol=1e-3)
    same(cp.cumprod(x[:, :5], 1), np.cumprod(a[:, :5], 1), rtol=1e-4)
    same(cp.asarray(a > 0).sum(), (a > 0).sum())
    same(cp.linalg.norm(x), np.linalg.norm(a), rtol=1e-4)
    same(cp.logaddexp(x, x), np.logaddexp(a, a))
    same(x.astype("float16").sum(), a.astype("float16").sum())
    same(cp.sort(x, 0), np.sort(a, 0))
    same(cp.argsort(x[:, 0]), np.argsort(a[:, 0]))
    same(cp.unique(cp.asarray([3, 1, 3])), np.array([1, 3]))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128", "int32"])
def test_products(dtype):
    a, b = sample((6, 7), dtype), sample((7, 5), dtype)
    x, y = cp.asarray(a), cp.asarray(b)
    tol = dict(rtol=1e-4, atol=1e-4)
    same(x @ y, a @ b, **tol)
    same(x.T.copy().T @ y, a @ b, **tol)
    same(x @ y[:, ::-1], a @ b[:, ::-1], **tol)
    same(y.T @ x.T, b.T @ a.T, **tol)
    same(x @ y[:, 0], a @ b[:, 0], **tol)
    same(cp.dot(x[0], x[1]), np.dot(a[0], a[1]), **tol)
    same(cp.tensordot(x, y, 1), np.tensordot(a, b, 1), **tol)
    same(cp.einsum("ij,jk->ki", x, y), np.einsum("ij,jk->ki", a, b), **tol)
    same(cp.outer(x[0], y[:, 0]), np.outer(a[0], b[:, 0]), **tol)
    p, q = sample((3, 2, 4, 6), dtype), sample((2, 6, 5), dtype)
    same(cp.matmul(cp.asarray(p), cp.asarray(q)), np.matmul(p, q), **tol)
    pt = p.swapaxes(-1, -2)
    same(cp.matmul(cp.asarray(p).swapaxes(-1, -2), cp.asarray(p)), np.matmul(pt, p), **tol)
    same(cp.einsum("abij,bjk->abik", cp.asarray(p), cp.asarray(q)), np.einsum("abij,bjk->abik", p, q), **tol)


def test_large_product():
    a, b = sample((300, 257), "float32"), sample((257, 129), "float32")
    same(cp.asarray(a) @ cp.asarray(b), a @ b, rtol=1e-3, atol=1e-3)


def test_random():
    cp.random.seed(3)
    a, n, k = cp.random.rand(1000), cp.random.randn(1001), cp.random.randint(0, 10, 1000)
    cp.random.seed(3)
    assert (a == cp.random.rand(1000)).all()
    assert a.min() >= 0 and a.max() < 1 and abs(a.mean() - 0.5) < 0.05
    assert abs(n.mean()) < 0.15 and abs(n.std() - 1) < 0.1
    assert k.min() == 0 and k.max() == 9
    assert sorted(cp.random.permutation(10).get()) == list(range(10))
    assert cp.random.normal(2, 3, (5, 3), dtype="float32").dtype == np.float32
    assert 0.1 < float(cp.random.binomial(1, 0.3, 500).mean()) < 0.5
    r = cp.random.RandomState(1)
    assert (r.uniform(size=5) == cp.random.RandomState(1).uniform(size=5)).all()


def test_conversion():
    a = sample((3, 4), "float32")
    x = cp.asarray(a)
    assert (cp.asnumpy(x) == a).all() and (x.get() == a).all()
    assert x[1, 2].item() == a[1, 2] and float(x[0, 0]) == a[0, 0]
    assert (cp.asnumpy(cp.asarray(a.T)) == a.T).all()
    cp.testing.assert_allclose(x, a)
    with pytest.raises(AssertionError):
        cp.testing.assert_array_equal(x, a + 1)
    with pytest.raises(TypeError):
        np.asarray(x)
    y = cp.from_dlpack(x)
    y[0, 0] = 5
    assert x[0, 0] == 5
    z = cp.asarray(type("Other", (), {"__cuda_array_interface__": x.__cuda_array_interface__})())
    assert z.data.ptr == x.data.ptr
    x.set(np.zeros((3, 4), "float32"))
    assert x.sum() == 0
