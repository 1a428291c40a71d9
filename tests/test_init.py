"""nn.init: distributions, scales, determinism, and what is refused."""

import math

import numpy as np
import pytest
from scipy import stats

import gpuad
from gpuad import nn
from gpuad.nn import init

SHAPE = (200, 100)


def array(tensor):
    return tensor.detach().cpu().numpy().astype(np.float64)


def is_drawn_from(tensor, distribution):
    """Kolmogorov-Smirnov; the seed is fixed, so that a p-value below 0.001 is a mistake and not bad luck."""
    assert stats.kstest(array(tensor).ravel(), distribution.cdf).pvalue > 1e-3


def uniform(bound):
    return stats.uniform(-bound, 2 * bound)


CASES = {
    "uniform": (lambda t, **k: init.uniform_(t, -3.0, 5.0, **k), stats.uniform(-3, 8)),
    "normal": (lambda t, **k: init.normal_(t, 2.0, 0.5, **k), stats.norm(2, 0.5)),
    "xavier_uniform": (lambda t, **k: init.xavier_uniform_(t, gain=2.0, **k), uniform(2 * math.sqrt(6 / 300))),
    "xavier_normal": (lambda t, **k: init.xavier_normal_(t, **k), stats.norm(0, math.sqrt(2 / 300))),
    "kaiming_uniform": (lambda t, **k: init.kaiming_uniform_(t, a=math.sqrt(5), **k), uniform(1 / math.sqrt(100))),
    "kaiming_normal": (
        lambda t, **k: init.kaiming_normal_(t, mode="fan_out", nonlinearity="relu", **k),
        stats.norm(0, math.sqrt(2 / 200)),
    ),
    "trunc_normal": (lambda t, **k: init.trunc_normal_(t, std=0.02, **k), stats.truncnorm(-100, 100, 0, 0.02)),
    "trunc_normal_tail": (
        lambda t, **k: init.trunc_normal_(t, 1.0, 2.0, 2.0, 4.5, **k),
        stats.truncnorm(0.5, 1.75, 1, 2),
    ),
}


@pytest.mark.parametrize("fill, distribution", CASES.values(), ids=CASES)
def test_distribution(device, fill, distribution):
    tensor = nn.Parameter(gpuad.empty(SHAPE, device=device))
    assert fill(tensor) is tensor
    assert tensor.is_leaf and tensor.requires_grad and tensor.device == device
    is_drawn_from(tensor, distribution)


@pytest.mark.parametrize("fill", [case[0] for case in CASES.values()] + [init.orthogonal_], ids=[*CASES, "orthogonal"])
def test_generator_decides(device, fill):
    first, second, other = (gpuad.empty(SHAPE, device=device) for _ in range(3))
    fill(first, generator=gpuad.Generator().manual_seed(3))
    gpuad.rand(7)
    fill(second, generator=gpuad.Generator().manual_seed(3))
    fill(other, generator=gpuad.Generator().manual_seed(4))
    assert np.array_equal(array(first), array(second)) and not np.array_equal(array(first), array(other))


def test_a_seed_gives_a_layer_the_same_values_on_every_device(device):
    gpuad.manual_seed(5)
    here = nn.Linear(7, 3)
    gpuad.manual_seed(5)
    there = nn.Linear(7, 3, device=device)
    for a, b in zip(here.parameters(), there.parameters()):
        assert b.device == device
        # One rounding of low + u · scale at most: the compiler of simulated devices contracts what CUDA keeps apart.
        np.testing.assert_allclose(array(b), array(a), rtol=0, atol=2**-24)


def test_layers_start_as_in_pytorch(device):
    linear = nn.Linear(64, 300, device=device)
    is_drawn_from(linear.weight, uniform(1 / 8))
    is_drawn_from(linear.bias, uniform(1 / 8))
    is_drawn_from(nn.Bilinear(16, 20, 10, device=device).weight, uniform(1 / 4))
    is_drawn_from(nn.Embedding(50, 40, device=device).weight, stats.norm())
    for norm in (nn.LayerNorm(4, device=device), nn.BatchNorm1d(4, device=device)):
        assert array(norm.weight).tolist() == [1] * 4 and array(norm.bias).tolist() == [0] * 4
    assert array(nn.PReLU(3, device=device).weight).tolist() == [0.25] * 3


def test_constants(device):
    tensor = gpuad.empty(2, 3, device=device, requires_grad=True)
    assert array(init.ones_(tensor)).tolist() == [[1] * 3] * 2
    assert array(init.zeros_(tensor)).tolist() == [[0] * 3] * 2
    assert array(init.constant_(tensor, 2.5)).tolist() == [[2.5] * 3] * 2
    assert array(init.eye_(tensor)).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert tensor.requires_grad and tensor.is_leaf


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 2, 3), (4, 4)])
def test_orthogonal(device, shape):
    tensor = init.orthogonal_(gpuad.empty(shape, device=device), gain=2.0)
    rows = array(tensor).reshape(shape[0], -1)
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-5)


def test_sparse(device):
    tensor = array(init.sparse_(gpuad.empty(10, 6, device=device), 0.31, std=2.0))
    assert ((tensor == 0).sum(0) == 4).all()


def test_trunc_normal_keeps_within_the_bounds():
    tensor = array(init.trunc_normal_(gpuad.empty(20000), 0.0, 1.0, -0.5, 3.0))
    assert tensor.min() >= -0.5 and tensor.max() <= 3.0
    with pytest.warns(UserWarning, match="more than 2 std"):
        far = array(init.trunc_normal_(gpuad.empty(20000), 0.0, 1.0, 5.0, 7.0))
    assert far.min() >= 5.0 and far.max() <= 7.0
    is_drawn_from(gpuad.tensor(far), stats.truncnorm(5, 7))


def test_half_precision_is_filled():
    tensor = init.kaiming_normal_(gpuad.empty(SHAPE, dtype=gpuad.float16))
    assert tensor.dtype == gpuad.float16
    assert abs(array(tensor).std() - math.sqrt(2 / 100)) < 2e-3


def test_gains():
    assert init.calculate_gain("linear") == init.calculate_gain("sigmoid") == init.calculate_gain("conv2d") == 1
    assert init.calculate_gain("tanh") == 5 / 3 and init.calculate_gain("selu") == 0.75
    assert init.calculate_gain("relu") == math.sqrt(2)
    assert init.calculate_gain("leaky_relu") == math.sqrt(2 / (1 + 0.01**2))
    assert init.calculate_gain("leaky_relu", 1) == 1
    with pytest.raises(ValueError, match="Unsupported nonlinearity swish; give"):
        init.calculate_gain("swish")
    with pytest.raises(ValueError, match="not a valid number"):
        init.calculate_gain("leaky_relu", "steep")


def test_what_is_refused():
    vector, matrix = gpuad.empty(3), gpuad.empty(3, 3)
    with pytest.raises(ValueError, match=r"fewer than 2 dimensions, got shape \(3,\)"):
        init.xavier_uniform_(vector)
    with pytest.raises(ValueError, match="2 or more dimensions"):
        init.orthogonal_(vector)
    for fill in (init.eye_, lambda t: init.sparse_(t, 0.5)):
        with pytest.raises(ValueError, match="2 dimensions"):
            fill(vector)
    with pytest.raises(ValueError, match="Mode sideways not supported"):
        init.kaiming_normal_(matrix, mode="sideways")
    with pytest.raises(ValueError, match="a < b"):
        init.trunc_normal_(matrix, a=1.0, b=1.0)
    with pytest.warns(UserWarning, match="zero-element"):
        init.kaiming_uniform_(gpuad.empty(0, 3))
