"""Random numbers: the words are Philox's, the numbers are the same on every device, captured draws are fresh."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import gpuad
from gpuad.array import dtypes, philox, random
from gpuad.errors import DeviceError, DtypeError, ShapeError

MASK = (1 << 64) - 1
gpuad.bfloat16  # noqa: B018  (makes its name known to NumPy)


def _cupy():
    try:
        import cupy

        return cupy if cupy.cuda.runtime.getDeviceCount() else None
    except Exception:
        return None


cupy = _cupy()
DEVICES = cupy.cuda.runtime.getDeviceCount() if cupy else 0
needs_cuda = pytest.mark.skipif(not DEVICES, reason="no CUDA device")


@pytest.fixture
def generator():
    return random.Generator().manual_seed(2024)


# ------------------------------------------------------------------------ the words


def philox_reference(key: int, counter: int) -> list[int]:
    """One block by the definition of Philox 4x64-10, in Python integers."""
    c = [(counter >> 64 * i) & MASK for i in range(4)]
    k = [key & MASK, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k[0], second & MASK, (first >> 64) ^ c[3] ^ k[1], first & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def stream_reference(key: int, counter: int, n: int) -> np.ndarray:
    words = [word for j in range(1, n // 4 + 2) for word in philox_reference(key, counter + j)]
    return np.array(words[:n], np.uint64)


def test_reference_is_random123s():
    """Known answers of Random123 (kat_vectors, philox4x64 10)."""
    assert philox_reference(0, 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    everything = philox_reference((1 << 128) - 1, (1 << 256) - 1)
    assert everything == [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]


@pytest.mark.parametrize("key, counter", [(0, 0), (5, 3), (MASK, MASK - 1), (7 << 64 | 9, 11 << 128 | 2)])
def test_words_on_the_host(key, counter):
    words = philox.philox_numpy(key, counter, 19)
    assert words.dtype == np.uint64
    np.testing.assert_array_equal(words, stream_reference(key, counter, 19))
    np.testing.assert_array_equal(words, np.random.Philox(key=key, counter=counter).random_raw(19))
    parts = [(key >> 64 * i) & MASK for i in range(2)], [(counter >> 64 * i) & MASK for i in range(4)]
    np.testing.assert_array_equal(words, philox.philox_numpy(*parts, 19))


@needs_cuda
@pytest.mark.parametrize("key, counter", [(0, 0), (5, 3), (MASK, MASK - 1), (7 << 64 | 9, 1 << 40)])
def test_words_on_the_device(key, counter):
    kernel = cupy.RawKernel(
        philox.CUDA_PHILOX
        + """extern "C" __global__ void words(unsigned long long* out, unsigned long long key0,
        unsigned long long key1, unsigned long long block) {
    gpuad_philox(key0, key1, block + threadIdx.x, out + 4 * threadIdx.x);
}""",
        "words",
    )
    out = cupy.zeros(64, np.uint64)
    kernel((1,), (16,), (out, np.uint64(key & MASK), np.uint64(key >> 64), np.uint64(counter)))
    expected = stream_reference(key, counter, 64)
    if counter == MASK - 1:  # the block number is 64 bits wide: it wraps after the counter 2**64
        expected = expected[:8]
    np.testing.assert_array_equal(cupy.asnumpy(out)[: expected.size], expected)


# ------------------------------------------------------------------------ words to numbers, on the host


def test_the_first_numbers_are_those_of_the_words(generator):
    """The documented map from words to elements, stated once more in plain arithmetic."""
    words = [int(word) for word in stream_reference(2024, 0, 8)]
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]

    def draw(name, *arguments, **keywords):
        return getattr(random, name)(generator.manual_seed(2024), *arguments, **keywords).tolist()

    assert draw("uniform", (16,)) == [(half >> 8) / 2**24 for half in halves]
    assert draw("uniform", (16,), "float16") == [(half >> 21) / 2**11 for half in halves]
    assert draw("uniform", (8,), "float64") == [(word >> 11) / 2**53 for word in words]
    assert draw("integers", (8,), -5, 1000) == [-5 + (word * 1005 >> 64) for word in words]
    span = 3 << 50
    assert draw("integers", (8,), -7, span) == [-7 + (word * (span + 7) >> 64) for word in words]
    assert draw("integers", (8,), 0, 1 << 64, np.uint64) == words
    assert draw("bernoulli", 0.3, (16,)) == [half / 2**32 < 0.3 for half in halves]
    assert draw("normal", (16,)) == pytest.approx(box_muller(halves, 32), rel=1e-5, abs=1e-6)
    assert draw("normal", (8,), "float64") == pytest.approx(box_muller([word >> 11 for word in words], 53), rel=1e-13)


def box_muller(numbers, bits):
    result = []
    for first, second in zip(numbers[::2], numbers[1::2], strict=True):
        signed = second - (1 << bits if second >> (bits - 1) else 0)
        radius, angle = np.sqrt(-2 * np.log((first + 0.5) / 2.0**bits)), np.pi * signed / 2.0 ** (bits - 1)
        result += [radius * np.cos(angle), radius * np.sin(angle)]
    return result


def test_uniform_is_numpys(generator):
    """Anyone can make the numbers again: they are those of numpy.random.Generator on the same Philox."""
    for dtype in ("float32", "float64"):
        expected = np.random.Generator(np.random.Philox(key=2024)).random(100_001, dtype=dtype)
        np.testing.assert_array_equal(random.uniform(generator.manual_seed(2024), (100_001,), dtype), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_distributions(generator, dtype):
    n = 400_000
    x = random.uniform(generator, (n,), dtype, -2.0, 3.0).astype("float64")
    assert x.min() >= -2 and x.max() <= 3
    assert abs(x.mean() - 0.5) < 0.01 and abs(x.var() - 25 / 12) < 0.02
    z = random.normal(generator, (n,), dtype, 1.0, 2.0).astype("float64")
    assert abs(z.mean() - 1) < 0.015 and abs(z.std() - 2) < 0.015
    standard = (z - 1) / 2
    assert abs((standard**3).mean()) < 0.03 and abs((standard**4).mean() - 3) < 0.08
    assert abs((standard[::2] * standard[1::2]).mean()) < 0.01  # cosine and sine of a pair
    inside = [(np.abs(standard) < t).mean() for t in (0.5, 1.0, 2.0, 3.0)]
    np.testing.assert_allclose(inside, [0.3829, 0.6827, 0.9545, 0.9973], atol=3e-3)


def test_integers_and_bernoulli(generator):
    x = random.integers(generator, (100_000,), -3, 7)
    assert x.dtype == np.int64
    assert (np.abs(np.bincount(x + 3, minlength=10) / 10_000 - 1) < 0.05).all()
    assert random.integers(generator, (1000,), 0, 256, "uint8").max() == 255
    assert set(random.integers(generator, (100,), -128, -126, "int8").tolist()) == {-128, -127}
    assert random.integers(generator, (9,), 4, 5, "float32").tolist() == [4.0] * 9
    assert abs(random.bernoulli(generator, 0.1, (400_000,)).mean() - 0.1) < 0.003
    assert random.bernoulli(generator, 1.0, (1000,)).all() and not random.bernoulli(generator, 0.0, (1000,)).any()
    mask = random.bernoulli(generator, 0.5, (1000,), "float32")
    assert mask.dtype == np.float32 and set(mask.tolist()) == {0.0, 1.0}
    p = np.repeat(np.float32([0, 0.25, 1]), 100_000)
    assert np.allclose(random.bernoulli(generator, p).reshape(3, -1).mean(1), [0, 0.25, 1], atol=0.01)
    scalar = random.bernoulli(generator.manual_seed(1), 0.25, (999,))
    np.testing.assert_array_equal(scalar, random.bernoulli(generator.manual_seed(1), np.full(999, 0.25)))


def test_permutation(generator):
    for n in (0, 1, 2, 3, 1000, 1025):
        assert sorted(random.permutation(generator, n).tolist()) == list(range(n))
    counts = {}
    for _ in range(6000):
        order = tuple(random.permutation(generator, 3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6 and all(abs(count - 1000) < 150 for count in counts.values())


def test_shape_and_out(generator):
    first = random.normal(generator, (3, 5))
    out = np.empty((3, 5), np.float32)
    assert random.normal(generator.manual_seed(2024), out=out) is out
    np.testing.assert_array_equal(out, first)
    view = np.zeros((5, 6), np.float32).T[::2]
    assert random.normal(generator.manual_seed(2024), out=view) is view
    np.testing.assert_array_equal(view, first)
    assert random.uniform(generator, ()).shape == ()
    before = generator.get_state()
    assert random.uniform(generator, (0, 3)).shape == (0, 3)
    np.testing.assert_array_equal(generator.get_state(), before)


def test_a_long_draw_is_its_beginning_and_more(generator):
    """Whatever the length, and over the edges of the blocks in which NumPy works."""
    long = random.normal(generator, (70_001,))
    for n in (1, 7, 16_384, 16_385):
        np.testing.assert_array_equal(random.normal(generator.manual_seed(2024), (n,)), long[:n])


# ------------------------------------------------------------------------ the generator


def test_generator_state(generator):
    assert generator.initial_seed() == 2024
    random.uniform(generator, (9,))  # two blocks
    state = generator.get_state()
    assert state.dtype == np.uint8 and state.view("<u8").tolist() == [2024, 2]
    first = random.normal(generator, (9,))
    generator.set_state(state)
    np.testing.assert_array_equal(random.normal(generator, (9,)), first)
    other = random.Generator()
    other.set_state(state)
    np.testing.assert_array_equal(random.normal(other, (9,)), first)
    assert not np.array_equal(random.normal(other, (9,)), first)
    with pytest.raises(ShapeError, match="16 bytes"):
        generator.set_state([1, 2, 3])


def test_seeds():
    generator = random.Generator()
    assert generator.initial_seed() == random.DEFAULT_SEED
    assert generator.manual_seed(-1) is generator and generator.initial_seed() == MASK
    for seed in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(ValueError, match="manual_seed"):
            generator.manual_seed(seed)
    assert generator.seed() == generator.initial_seed() != generator.seed()


def test_default_generator():
    assert random.manual_seed(3) is random.default_generator
    assert random.initial_seed() == 3
    first = random.uniform(shape=(4,))
    random.manual_seed(3)
    np.testing.assert_array_equal(random.uniform(shape=(4,)), first)
    assert random.seed() == random.initial_seed()


def test_errors(generator):
    with pytest.raises(DtypeError, match="int64"):
        random.normal(generator, (3,), np.int64)
    with pytest.raises(DtypeError, match="bool"):
        random.integers(generator, (3,), 0, 2, bool)
    with pytest.raises(DtypeError, match="bernoulli"):
        random.bernoulli(generator, np.ones(3, np.int64))
    for call in (
        lambda: random.uniform(generator, (3,), low=2.0, high=1.0),
        lambda: random.normal(generator, (3,), std=-1.0),
        lambda: random.integers(generator, (3,), 5, 5),
        lambda: random.integers(generator, (3,), 0, 257, np.uint8),
        lambda: random.bernoulli(generator, 1.5, (3,)),
    ):
        with pytest.raises(ValueError, match="got"):
            call()


def test_threads_share_a_generator(generator):
    """Draws from several threads never overlap."""
    results = []

    def work():
        for _ in range(50):
            results.append(random.integers(generator, (4,), 0, 1 << 64, np.uint64))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drawn = np.sort(np.concatenate(results))
    np.testing.assert_array_equal(drawn, np.sort(stream_reference(2024, 0, 800)))


# ------------------------------------------------------------------------ CUDA

HALVES = ("float16", "bfloat16")
DRAWS = [
    *(
        (name, (), dtype, {})
        for name in ("uniform", "normal")
        for dtype in ("float16", "bfloat16", "float32", "float64")
    ),
    *(("uniform", (), dtype, {"low": -0.3, "high": 0.7}) for dtype in (*HALVES, "float32", "float64")),
    *(("normal", (), dtype, {"mean": 5.0, "std": 0.1}) for dtype in (*HALVES, "float32", "float64")),
    *(
        ("integers", (-100, 27), dtype, {})
        for dtype in ("int8", "int16", "int32", "int64", "float16", "bfloat16", "float32")
    ),
    ("integers", (0, 200), "uint8", {}),
    ("integers", (-5, 1 << 40), "int64", {}),
    ("integers", (-(1 << 63), 1 << 63), "int64", {}),
    *(
        ("bernoulli", (p,), dtype, {})
        for p in (0.0, 0.1, 1.0)
        for dtype in ("bool", "float16", "bfloat16", "float32", "int64")
    ),
]


def run(draw, generator, shape, device):
    name, arguments, dtype, keywords = draw
    function = getattr(random, name)
    if name == "bernoulli":
        return function(generator, *arguments, shape, dtype, device)
    if name == "integers":
        return function(generator, shape, *arguments, dtype, device)
    return function(generator, shape, dtype, device=device, **keywords)


@needs_cuda
@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_same_numbers_on_every_device(draw, generator):
    for shape in [(1,), (7,), (3, 5), (8,), (4099,)]:
        generator.manual_seed(99)
        random.uniform(generator, (5,))
        state = generator.get_state()
        expected = run(draw, generator, shape, None)
        after = generator.get_state()
        for ordinal in range(DEVICES):
            generator.set_state(state)
            result = run(draw, generator, shape, ordinal)
            assert result.device.id == ordinal and result.dtype == expected.dtype and result.shape == shape
            np.testing.assert_array_equal(generator.get_state(), after)
            if draw[0] == "normal":
                # NumPy's and CUDA's log, sin and cos differ by an ulp or two each; the mean adds its own rounding
                z = (expected.astype("float64") - draw[3].get("mean", 0.0)) / draw[3].get("std", 1.0)
                ulps = dtypes.finfo(expected.dtype).eps * (8 * np.abs(z) * draw[3].get("std", 1.0))
                ulps += np.spacing(np.abs(expected)).astype("float64")
                error = np.abs(cupy.asnumpy(result).astype("float64") - expected.astype("float64"))
                assert (error <= ulps).all()
            else:
                np.testing.assert_array_equal(cupy.asnumpy(result), expected)


@needs_cuda
def test_probability_arrays_and_permutations_on_cuda(generator):
    p = np.random.default_rng(0).random((5, 7))
    for dtype in ("float16", "float32", "float64"):
        expected = random.bernoulli(generator.manual_seed(1), p.astype(dtype).T)
        result = random.bernoulli(generator.manual_seed(1), cupy.asarray(p.astype(dtype)).T)
        np.testing.assert_array_equal(cupy.asnumpy(result), expected)
    for n in (0, 1, 1000):
        expected = random.permutation(generator.manual_seed(1), n)
        np.testing.assert_array_equal(cupy.asnumpy(random.permutation(generator.manual_seed(1), n, 0)), expected)


@needs_cuda
def test_unaligned_and_strided_out_on_cuda(generator):
    expected = random.uniform(generator, (1000,))
    base = cupy.zeros(1008, np.float32)
    for view in (base[1:1001], base[3:1003], cupy.zeros(2000, np.float32)[::2]):
        assert random.uniform(generator.manual_seed(2024), out=view) is view
        np.testing.assert_array_equal(cupy.asnumpy(view), expected)
    assert base[0] == 0 and (base[1003:] == 0).all()


@needs_cuda
@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_one_launch(draw, generator, cudasim):
    run(draw, generator, (1000,), 0)
    with cudasim.record() as recording:
        run(draw, generator, (1000,), 0)
    stats = recording.stats
    assert recording.kernel_launches == 1
    assert (recording.syncs, recording.library_calls, stats["copies"], stats["memsets"]) == (0, 0, {}, 0)
    assert stats["mallocs"] == 0


@needs_cuda
def test_captured_draws_are_fresh_and_those_of_eager(generator, cudasim):
    """Each replay gives what the same calls would have given eagerly, with other draws in between."""
    noise, mask = cupy.empty((3, 5), np.float32), cupy.empty(50, np.bool_)

    def step(noise, mask):
        random.normal(generator, out=noise)
        random.bernoulli(generator, 0.5, out=mask)

    def between():
        return random.uniform(generator, (11,))

    step(noise, mask)  # compiles the kernels
    generator.manual_seed(7)
    stream = cupy.cuda.Stream(non_blocking=True)
    replayed, eager = [], []
    with stream:
        with generator.capture(0) as draws:
            stream.begin_capture()
            step(noise, mask)
            graph = stream.end_capture()
        assert generator.get_state().view("<u8").tolist() == [7, 0]
        assert draws.blocks == 2 + 7
        draws.advance_base()
        generator.manual_seed(7)
        for _ in range(3):
            with cudasim.record() as recording:
                draws.advance_base()
                graph.launch(stream)
                stream.synchronize()  # the one synchronisation there is
            stats = recording.stats
            assert (recording.kernel_launches, stats["graph_launches"], recording.graph_kernels) == (1, 1, 2)
            assert (recording.syncs, stats["copies"], stats["mallocs"]) == (1, {}, 0)
            replayed += [cupy.asnumpy(noise), cupy.asnumpy(mask), between()]
    generator.manual_seed(7)
    for _ in range(3):
        step(noise, mask)
        eager += [cupy.asnumpy(noise), cupy.asnumpy(mask), between()]
    for one, other in zip(replayed, eager, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(eager[0], eager[3])


@needs_cuda
def test_capture_without_the_generator_is_an_error(generator):
    random.uniform(generator, (4,), device=0)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(DeviceError, match="generator.capture"):
                random.uniform(generator, out=cupy.ndarray((4,), np.float32))
        finally:
            stream.end_capture()
    with generator.capture(0), pytest.raises(DeviceError, match="already"), generator.capture(0):
        pass
