"""Layers, activations and losses as modules: each passes on its hyperparameters, and computes what it says."""

import math

import numpy as np
import pytest
from scipy import special

import gpuad
from gpuad import nn

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 3
Y = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
P = np.random.default_rng(2).uniform(0.05, 0.95, size=(6, 4)).astype(np.float32)
Q = special.softmax(Y, axis=1)
LABELS = np.array([0, 3, 1, 2, 2, 0])
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.25], dtype=np.float32)


def array(tensor):
    return tensor.detach().cpu().numpy()


def close(tensor, expected, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(array(tensor), expected, rtol=rtol, atol=atol)


def on(device, *arrays):
    return [gpuad.tensor(values, device=device) for values in arrays]


# ---------------------------------------------------------------------- activations

sigmoid = special.expit
softplus = np.logaddexp(X, 0)
ACTIVATIONS = [
    (nn.ReLU(), np.maximum(X, 0)),
    (nn.ReLU6(), np.clip(X, 0, 6)),
    (nn.LeakyReLU(), np.where(X > 0, X, 0.01 * X)),
    (nn.LeakyReLU(0.3), np.where(X > 0, X, 0.3 * X)),
    (nn.ELU(), np.where(X > 0, X, np.expm1(X))),
    (nn.ELU(0.5), np.where(X > 0, X, 0.5 * np.expm1(X))),
    (nn.CELU(2.0), np.maximum(X, 0) + np.minimum(2 * np.expm1(X / 2), 0)),
    (
        nn.SELU(),
        1.0507009873554804934193349852946 * np.where(X > 0, X, 1.6732632423543772848170429916717 * np.expm1(X)),
    ),
    (nn.GELU(), X * special.ndtr(X)),
    (nn.GELU("tanh"), 0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3)))),
    (nn.SiLU(), X * sigmoid(X)),
    (nn.Mish(), X * np.tanh(softplus)),
    (nn.Sigmoid(), sigmoid(X)),
    (nn.Tanh(), np.tanh(X)),
    (nn.LogSigmoid(), -np.logaddexp(-X, 0)),
    (nn.Softplus(), softplus),
    (nn.Softplus(2.0, 3.0), np.where(2 * X > 3, X, np.log1p(np.exp(np.minimum(2 * X, 3))) / 2)),
    (nn.Softsign(), X / (1 + np.abs(X))),
    (nn.Tanhshrink(), X - np.tanh(X)),
    (nn.Softshrink(1.0), np.sign(X) * np.maximum(np.abs(X) - 1, 0)),
    (nn.Hardshrink(1.0), np.where(np.abs(X) > 1, X, 0)),
    (nn.Hardtanh(), np.clip(X, -1, 1)),
    (nn.Hardtanh(-2.0, 0.5), np.clip(X, -2, 0.5)),
    (nn.Hardsigmoid(), np.clip(X / 6 + 0.5, 0, 1)),
    (nn.Hardswish(), X * np.clip(X / 6 + 0.5, 0, 1)),
    (nn.Threshold(0.5, 9.0), np.where(X > 0.5, X, 9)),
    (nn.Softmax(dim=1), special.softmax(X, axis=1)),
    (nn.Softmin(dim=0), special.softmax(-X, axis=0)),
    (nn.LogSoftmax(-1), special.log_softmax(X, axis=1)),
    (nn.GLU(), X[:, :2] * sigmoid(X[:, 2:])),
    (nn.GLU(0), X[:3] * sigmoid(X[3:])),
]


@pytest.mark.parametrize(
    "module, expected", ACTIVATIONS, ids=lambda value: repr(value) if isinstance(value, nn.Module) else ""
)
def test_activation(device, module, expected):
    (x,) = on(device, X)
    output = module(x)
    assert output.device == device and output.dtype == gpuad.float32
    close(output, expected)
    assert np.array_equal(array(x), X)  # the input is left alone


@pytest.mark.parametrize(
    "kind",
    [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish, nn.Hardtanh],
    ids=lambda k: k.__name__,
)
def test_activation_in_place(device, kind):
    (x,) = on(device, X)
    expected = array(kind()(x))
    output = kind(inplace=True)(x)
    assert output is x
    close(x, expected)
    assert repr(kind(inplace=True)).endswith("inplace=True)") and "inplace" not in repr(kind())


def test_prelu_learns_a_slope_for_each_channel(device):
    (x,) = on(device, X)
    one, each = nn.PReLU(device=device), nn.PReLU(4, init=0.1, device=device)
    close(one(x), np.where(X > 0, X, 0.25 * X))
    with gpuad.no_grad():
        each.weight.copy_(gpuad.tensor(WEIGHTS, device=device))
    each(x).sum().backward()
    close(each(x), np.where(X > 0, X, WEIGHTS * X))
    close(each.weight.grad, np.minimum(X, 0).sum(0))


def test_reprs_show_the_hyperparameters():
    for module, expected in (
        (nn.ReLU(), "ReLU()"),
        (nn.LeakyReLU(0.2), "LeakyReLU(negative_slope=0.2)"),
        (nn.GELU(), "GELU(approximate='none')"),
        (nn.Softplus(), "Softplus(beta=1.0, threshold=20.0)"),
        (nn.Hardshrink(), "Hardshrink(0.5)"),
        (nn.Softmax(1), "Softmax(dim=1)"),
        (nn.Threshold(0.1, 20), "Threshold(threshold=0.1, value=20)"),
        (nn.PReLU(2), "PReLU(num_parameters=2)"),
        (nn.Bilinear(1, 2, 3), "Bilinear(in1_features=1, in2_features=2, out_features=3, bias=True)"),
        (nn.Flatten(), "Flatten(start_dim=1, end_dim=-1)"),
        (nn.Unflatten(1, (2, 3)), "Unflatten(dim=1, unflattened_size=(2, 3))"),
        (nn.LayerNorm(3), "LayerNorm((3,), eps=1e-05, elementwise_affine=True, bias=True)"),
        (nn.RMSNorm([2, 3]), "RMSNorm((2, 3), eps=None, elementwise_affine=True)"),
        (
            nn.BatchNorm1d(3),
            "BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)",
        ),
        (nn.Embedding(5, 2, padding_idx=-1), "Embedding(5, 2, padding_idx=4)"),
        (nn.CrossEntropyLoss(), "CrossEntropyLoss()"),
    ):
        assert repr(module) == expected


# ---------------------------------------------------------------------- linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (0,)])
def test_linear(device, leading, bias):
    layer = nn.Linear(4, 3, bias=bias, device=device)
    x = gpuad.randn(*leading, 4, device=device, requires_grad=True)
    y = layer(x)
    expected = array(x) @ array(layer.weight).T + (array(layer.bias) if bias else 0)
    assert y.shape == (*leading, 3)
    close(y, expected)
    y.sum().backward()
    rows = array(x).reshape(-1, 4)
    close(layer.weight.grad, np.broadcast_to(rows.sum(0), (3, 4)), atol=1e-5)
    close(x.grad, np.broadcast_to(array(layer.weight).sum(0), x.shape))
    if bias:
        close(layer.bias.grad, np.full(3, len(rows)))
    else:
        assert layer.bias is None


def test_linear_with_an_input_that_does_not_fit():
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)3.*4|4.*3"):
        nn.Linear(4, 2)(gpuad.ones(5, 3))


def test_linear_of_a_dtype():
    layer = nn.Linear(2, 2, dtype=gpuad.float64)
    assert layer.weight.dtype == layer.bias.dtype == layer(gpuad.ones(1, 2, dtype=gpuad.float64)).dtype == gpuad.float64


def test_bilinear(device):
    layer = nn.Bilinear(4, 3, 5, device=device)
    x, y = gpuad.randn(2, 6, 4, device=device), gpuad.randn(2, 6, 3, device=device)
    expected = np.einsum("...i,kij,...j->...k", array(x), array(layer.weight), array(y)) + array(layer.bias)
    close(layer(x, y), expected, rtol=1e-4, atol=1e-5)
    assert nn.Bilinear(4, 3, 5, bias=False, device=device)(x[0, 0], y[0, 0]).shape == (5,)
    with pytest.raises(ValueError, match="in1_features must be > 0"):
        nn.Bilinear(0, 3, 5)


def test_shape_layers():
    x = gpuad.arange(24).reshape(2, 3, 4)
    assert nn.Flatten()(x).shape == (2, 12) and nn.Flatten(0, 1)(x).shape == (6, 4)
    assert nn.Unflatten(2, (2, -1))(x).shape == (2, 3, 2, 2) and nn.Unflatten(-1, (4, 1))(x).shape == (2, 3, 4, 1)
    assert nn.Identity("anything", at=1)(x) is x
    with pytest.raises(TypeError, match="found type int"):
        nn.Unflatten(1, 3)
    with pytest.raises(TypeError, match="float at pos 1"):
        nn.Unflatten(1, (3, 1.5))


# ---------------------------------------------------------------------- dropout


def test_dropout(device):
    layer = nn.Dropout(0.25)
    x = gpuad.ones(200, 100, device=device, requires_grad=True)
    y = layer(x)
    values = array(y)
    assert set(np.unique(values)) == {0.0, np.float32(1 / 0.75)}
    assert abs((values == 0).mean() - 0.25) < 0.02
    y.sum().backward()
    assert np.array_equal(array(x.grad), values)
    assert not np.array_equal(array(layer(x)), values)
    assert np.array_equal(array(layer.eval()(x)), array(x))
    assert (array(nn.Dropout(1.0)(x)) == 0).all() and (array(nn.Dropout(0.0)(x)) == 1).all()
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"between 0 and 1, but got {p}"):
            nn.Dropout(p)


def test_dropout_masks_are_the_same_on_every_device(device):
    masks = []
    for place in (gpuad.device("cpu"), device):
        gpuad.manual_seed(7)
        masks.append(array(nn.Dropout(0.5)(gpuad.ones(1000, device=place))))
    assert np.array_equal(*masks)


def test_dropout_stores_no_mask_and_drops_what_is_not_finite(device):
    x = gpuad.full((20, 30), float("inf"), device=device, requires_grad=True)
    y = nn.functional.dropout(x.T, 0.5)
    assert set(np.unique(array(y))) == {0.0, np.inf}
    assert y.grad_fn.saved == ()
    y.backward(gpuad.ones(30, 20, device=device))
    assert np.array_equal(array(x.grad.T) != 0, array(y) != 0)


def test_dropout_is_one_launch_each_way(cuda_device, counts):
    x = gpuad.randn(64, 32, device="cuda", requires_grad=True)
    g = gpuad.ones(64, 32, device="cuda")
    nn.functional.dropout(x, 0.5).backward(g)
    with counts() as forward:
        y = nn.functional.dropout(x, 0.5)
    with counts() as backward:
        y.backward(g)
    assert forward.kernel_launches == 1
    assert set(backward.stats["kernels"]) <= {"gpuad_draw", "cupy_add__float32_float32_float32"}, backward.stats
    assert backward.stats["kernels"]["gpuad_draw"] == 1


# ---------------------------------------------------------------------- normalisation


def test_layer_norm(device):
    (x,) = on(device, X)
    layer = nn.LayerNorm(4, device=device)
    expected = (X - X.mean(1, keepdims=True)) / np.sqrt(X.var(1, keepdims=True) + 1e-5)
    close(layer(x), expected, atol=1e-5)
    with gpuad.no_grad():
        layer.weight.copy_(gpuad.tensor(WEIGHTS, device=device))
        layer.bias.fill_(2.0)
    close(layer(x), expected * WEIGHTS + 2, atol=1e-5)
    close(
        nn.LayerNorm((6, 4), eps=0.5, bias=False, device=device)(x), (X - X.mean()) / np.sqrt(X.var() + 0.5), atol=1e-5
    )
    assert nn.LayerNorm(4, bias=False).bias is None
    assert not list(nn.LayerNorm(4, elementwise_affine=False).parameters())


def test_rms_norm(device):
    (x,) = on(device, X)
    layer = nn.RMSNorm(4, device=device)
    epsilon = np.finfo(np.float32).eps
    close(layer(x), X / np.sqrt((X**2).mean(1, keepdims=True) + epsilon))
    close(nn.RMSNorm((6, 4), eps=0.5, elementwise_affine=False)(x), X / np.sqrt((X**2).mean() + 0.5))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def normalised(x, mean, var, eps=1e-5):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)


@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3)])
def test_batch_norm_running_statistics(device, momentum, shape):
    layer = nn.BatchNorm1d(4, momentum=momentum, device=device)
    mean, var = np.zeros(4), np.ones(4)
    axes = (0,) if len(shape) == 2 else (0, 2)
    for step in range(1, 5):
        x = gpuad.randn(*shape, device=device) * step + step
        values = array(x).astype(np.float64)
        close(layer(x), normalised(values, values.mean(axes), values.var(axes)), rtol=1e-3, atol=1e-4)
        share = 1 / step if momentum is None else momentum
        mean = (1 - share) * mean + share * values.mean(axes)
        var = (1 - share) * var + share * values.var(axes, ddof=1)
        close(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
        close(layer.running_var, var, rtol=1e-4)
        assert layer.num_batches_tracked.item() == step
    layer.eval()
    close(layer(x), normalised(values, mean, var), rtol=1e-3, atol=1e-4)
    assert layer.num_batches_tracked.item() == 4
    layer.reset_running_stats()
    assert array(layer.running_var).tolist() == [1] * 4 and layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_waits_for_nothing(cuda_device, counts, momentum):
    layer = nn.BatchNorm1d(4, momentum=momentum, device=cuda_device)
    x = gpuad.randn(6, 4, device=cuda_device)
    layer(x)
    with counts() as record:
        layer(x)
    assert record.syncs == 0 and record.copies("h2d") == record.copies("d2h") == (0, 0)


def test_batch_norm_without_running_statistics_or_weights(device):
    layer = nn.BatchNorm1d(4, affine=False, track_running_stats=False, device=device)
    (x,) = on(device, X)
    for mode in (True, False):
        close(layer.train(mode)(x), normalised(X, X.mean(0), X.var(0)), atol=1e-5)
    assert not layer.state_dict() and layer.running_mean is None and layer.num_batches_tracked is None
    assert nn.BatchNorm1d(4, bias=False).bias is None


def test_batch_norm_gradients_do_not_reach_the_statistics(device):
    layer = nn.BatchNorm1d(4, device=device)
    x = gpuad.tensor(X, device=device, requires_grad=True)
    (layer(x) * gpuad.tensor(Y, device=device)).sum().backward()
    assert not layer.running_mean.requires_grad
    close(layer.bias.grad, Y.sum(0), atol=1e-5)
    close(x.grad.sum(0), np.zeros(4), atol=1e-4)


def test_batch_norm_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"2D or 3D input \(got 4D input\)"):
        nn.BatchNorm1d(2)(gpuad.ones(1, 2, 1, 1))
    with pytest.raises(ValueError, match="more than (1|one) value"):
        nn.BatchNorm1d(2)(gpuad.ones(1, 2))


# ---------------------------------------------------------------------- embedding


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
def test_embedding(device, shape):
    layer = nn.Embedding(7, 3, device=device)
    indices = gpuad.randint(0, 7, shape, device=device)
    y = layer(indices)
    assert y.shape == (*shape, 3) and np.array_equal(array(y), array(layer.weight)[array(indices)])
    y.sum().backward()
    counts = np.bincount(array(indices).ravel(), minlength=7)
    assert np.array_equal(array(layer.weight.grad), np.repeat(counts[:, None], 3, axis=1))


def test_embedding_padding_starts_at_0_and_gets_no_gradient(device):
    layer = nn.Embedding(5, 2, padding_idx=-2, device=device)
    assert layer.padding_idx == 3 and array(layer.weight)[3].tolist() == [0, 0]
    assert layer.weight.is_leaf and layer.weight.requires_grad
    layer(gpuad.tensor([3, 1, 3], device=device)).sum().backward()
    assert array(layer.weight.grad).tolist() == [[0, 0], [1, 1], [0, 0], [0, 0], [0, 0]]
    for padding in (5, -6):
        with pytest.raises(ValueError, match=f"got {padding} for 5 embeddings"):
            nn.Embedding(5, 2, padding_idx=padding)


def test_embedding_from_pretrained():
    table = gpuad.arange(6, dtype=gpuad.float32).reshape(3, 2)
    frozen = nn.Embedding.from_pretrained(table)
    assert not frozen.weight.requires_grad and array(frozen(gpuad.tensor([2, 0]))).tolist() == [[4, 5], [0, 1]]
    assert nn.Embedding.from_pretrained(table, freeze=False).weight.requires_grad
    with pytest.raises(ValueError, match="2-dimensional"):
        nn.Embedding.from_pretrained(gpuad.ones(3))


# ---------------------------------------------------------------------- losses

DIFFERENCE = np.abs(X - Y)
LOGS = special.log_softmax(X, axis=1)
PICKED = -LOGS[np.arange(6), LABELS]
ELEMENTWISE_LOSSES = [
    (nn.MSELoss, {}, (X, Y), DIFFERENCE**2),
    (nn.L1Loss, {}, (X, Y), DIFFERENCE),
    (nn.SmoothL1Loss, {}, (X, Y), np.where(DIFFERENCE < 1, DIFFERENCE**2 / 2, DIFFERENCE - 0.5)),
    (nn.SmoothL1Loss, {"beta": 2.0}, (X, Y), np.where(DIFFERENCE < 2, DIFFERENCE**2 / 4, DIFFERENCE - 1)),
    (nn.HuberLoss, {"delta": 2.0}, (X, Y), np.where(DIFFERENCE < 2, DIFFERENCE**2 / 2, 2 * (DIFFERENCE - 1))),
    (nn.BCELoss, {}, (P, Q), -(Q * np.log(P) + (1 - Q) * np.log1p(-P))),
    (nn.BCELoss, {"weight": WEIGHTS}, (P, Q), -WEIGHTS * (Q * np.log(P) + (1 - Q) * np.log1p(-P))),
    (nn.BCEWithLogitsLoss, {}, (X, Q), Q * np.logaddexp(0, -X) + (1 - Q) * np.logaddexp(0, X)),
    (
        nn.BCEWithLogitsLoss,
        {"weight": WEIGHTS, "pos_weight": WEIGHTS + 1},
        (X, Q),
        WEIGHTS * ((WEIGHTS + 1) * Q * np.logaddexp(0, -X) + (1 - Q) * np.logaddexp(0, X)),
    ),
    (nn.KLDivLoss, {}, (LOGS, Q), Q * (np.log(Q) - LOGS)),
    (nn.KLDivLoss, {"log_target": True}, (LOGS, np.log(Q)), Q * (np.log(Q) - LOGS)),
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ELEMENTWISE_LOSSES, ids=lambda case: case[0].__name__ + "".join(case[1]))
@pytest.mark.filterwarnings("ignore:reduction")
def test_elementwise_loss(device, case, reduction):
    kind, kwargs, inputs, expected = case
    kwargs = {key: gpuad.tensor(v, device=device) if isinstance(v, np.ndarray) else v for key, v in kwargs.items()}
    loss = kind(**kwargs, reduction=reduction)(*on(device, *inputs))
    close(loss, {"mean": np.mean, "sum": np.sum, "none": np.asarray}[reduction](expected), rtol=1e-4)


def test_kl_batchmean(device):
    close(nn.KLDivLoss(reduction="batchmean")(*on(device, LOGS, Q)), (Q * (np.log(Q) - LOGS)).sum() / 6, rtol=1e-4)


COUNTED = WEIGHTS[LABELS] * (LABELS != 2)
CROSS_ENTROPIES = [
    ({}, LABELS, PICKED, np.ones(6)),
    ({"weight": WEIGHTS}, LABELS, PICKED * WEIGHTS[LABELS], WEIGHTS[LABELS]),
    ({"ignore_index": 2}, LABELS, PICKED * (LABELS != 2), (LABELS != 2) * 1.0),
    ({"weight": WEIGHTS, "ignore_index": 2}, LABELS, PICKED * COUNTED, COUNTED),
    ({"label_smoothing": 0.2}, LABELS, 0.8 * PICKED - 0.2 * LOGS.mean(1), np.ones(6)),
    ({}, Q, -(Q * LOGS).sum(1), np.ones(6)),
    ({"weight": WEIGHTS}, Q, -(Q * WEIGHTS * LOGS).sum(1), np.ones(6)),
    ({"label_smoothing": 0.2}, Q, -((0.8 * Q + 0.05) * LOGS).sum(1), np.ones(6)),
]  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kwargs, target, losses, counts", CROSS_ENTROPIES)
def test_cross_entropy(device, kwargs, target, losses, counts, reduction):
    kwargs = {key: gpuad.tensor(v, device=device) if isinstance(v, np.ndarray) else v for key, v in kwargs.items()}
    x, target = on(device, X, target)
    expected = {"mean": losses.sum() / counts.sum(), "sum": losses.sum(), "none": losses}[reduction]
    close(nn.CrossEntropyLoss(**kwargs, reduction=reduction)(x, target), expected, rtol=1e-4)
    if target.ndim == 1 and "label_smoothing" not in kwargs:
        log_probabilities = nn.LogSoftmax(1)(x)
        close(nn.NLLLoss(**kwargs, reduction=reduction)(log_probabilities, target), expected, rtol=1e-4)


def test_loss_arguments_in_the_places_of_pytorch():
    x, y = gpuad.tensor(X), gpuad.tensor(Y)
    assert nn.MSELoss(False).reduction == "sum" and nn.MSELoss(None, False).reduction == "none"
    assert nn.MSELoss(True, True).reduction == "mean"
    assert nn.NLLLoss(None, None, 3).ignore_index == 3
    assert nn.MSELoss(reduction="none")(x, y).shape == (6, 4)
    with pytest.raises(ValueError, match="median is not a valid value for reduction"):
        nn.L1Loss(reduction="median")


def test_loss_weights_are_buffers_that_move(device):
    loss = nn.BCEWithLogitsLoss(weight=gpuad.tensor(WEIGHTS), pos_weight=gpuad.tensor(WEIGHTS)).to(device)
    assert [name for name, _ in loss.named_buffers()] == ["weight", "pos_weight"]
    assert loss.weight.device == device
    loss(*on(device, X, Q))


# ---------------------------------------------------------------------- all together


def test_a_model_learns(device):
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
    x = gpuad.rand(64, 2, device=device) * 2 - 1
    y = x[:, :1] * x[:, 1:]
    loss_of, losses = nn.MSELoss(), []
    for _ in range(200):
        model.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        with gpuad.no_grad():
            for parameter in model.parameters():
                parameter -= 0.3 * parameter.grad
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
