"""Learning-rate schedules against their closed forms, alone and combined, and resumed from a state_dict."""

import copy
import json
import math

import pytest

from gpuad.optim import lr_scheduler as lr

EPOCHS = 70
RATES = (0.1, 0.03)


class Groups:
    """As much of an optimiser as a scheduler sees."""

    def __init__(self, **hyperparameters):
        self.param_groups = [{"lr": rate, **hyperparameters} for rate in RATES]


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def run(make, epochs=EPOCHS, key="lr"):
    """The first group's value in each epoch."""
    optimizer = Groups(momentum=0.9)
    scheduler = make(optimizer)
    seen = []
    for _ in range(epochs):
        assert scheduler.get_last_lr() == rates(optimizer)
        seen.append(optimizer.param_groups[0][key])
        scheduler.step()
    return seen


def cosine(epoch, period, floor=0.0):
    return floor + (0.1 - floor) * (1 + math.cos(math.pi * epoch / period)) / 2


def restarting(epoch, period, growth):
    while epoch >= period:
        epoch, period = epoch - period, period * growth
    return cosine(epoch, period)


CASES = {
    "StepLR": (lambda o: lr.StepLR(o, 7, 0.3), lambda t: 0.1 * 0.3 ** (t // 7)),
    "MultiStepLR": (
        lambda o: lr.MultiStepLR(o, [10, 3, 3, 41], 0.5),
        lambda t: 0.1 * 0.5 ** (2 * (t >= 3) + (t >= 10) + (t >= 41)),
    ),
    "ConstantLR": (lambda o: lr.ConstantLR(o, 0.25, 9), lambda t: 0.1 * (0.25 if t < 9 else 1)),
    "ConstantLR from 0": (lambda o: lr.ConstantLR(o, 0.0, 9), lambda t: 0.1 * (t >= 9)),
    "LinearLR": (lambda o: lr.LinearLR(o, 0.1, 0.9, 13), lambda t: 0.1 * (0.1 + 0.8 * min(t, 13) / 13)),
    "LinearLR to 0": (lambda o: lr.LinearLR(o, 1.0, 0.0, 13), lambda t: 0.1 * (1 - min(t, 13) / 13)),
    "ExponentialLR": (lambda o: lr.ExponentialLR(o, 0.9), lambda t: 0.1 * 0.9**t),
    "PolynomialLR": (lambda o: lr.PolynomialLR(o, 20, 2.0), lambda t: 0.1 * (1 - min(t, 20) / 20) ** 2),
    "CosineAnnealingLR": (lambda o: lr.CosineAnnealingLR(o, 10, 0.01), lambda t: cosine(t, 10, 0.01)),
    "CosineAnnealingLR T_max=1": (lambda o: lr.CosineAnnealingLR(o, 1), lambda t: cosine(t, 1)),
    "CosineAnnealingLR long": (lambda o: lr.CosineAnnealingLR(o, 100), lambda t: cosine(t, 100)),
    "CosineAnnealingWarmRestarts": (
        lambda o: lr.CosineAnnealingWarmRestarts(o, 5, 2),
        lambda t: restarting(t, 5, 2),
    ),
    "CosineAnnealingWarmRestarts even": (
        lambda o: lr.CosineAnnealingWarmRestarts(o, 7),
        lambda t: restarting(t, 7, 1),
    ),
    "LambdaLR": (lambda o: lr.LambdaLR(o, lambda t: 1 / (1 + t)), lambda t: 0.1 / (1 + t)),
    "MultiplicativeLR": (lambda o: lr.MultiplicativeLR(o, lambda t: 0.95), lambda t: 0.1 * 0.95**t),
    "ChainedScheduler": (
        lambda o: lr.ChainedScheduler([lr.LinearLR(o, 0.1, 1.0, 5), lr.ExponentialLR(o, 0.9), lr.StepLR(o, 10)]),
        lambda t: 0.1 * (0.1 + 0.9 * min(t, 5) / 5) * 0.9**t * 0.1 ** (t // 10),
    ),
    "SequentialLR": (
        lambda o: lr.SequentialLR(
            o, [lr.LinearLR(o, 0.1, 1.0, 5), lr.CosineAnnealingLR(o, 30), lr.StepLR(o, 2, 0.5)], [5, 35]
        ),
        lambda t: 0.1 * (0.1 + 0.9 * t / 5) if t < 5 else cosine(t - 5, 30) if t < 35 else 0.1 * 0.5 ** ((t - 35) // 2),
    ),
    "SequentialLR of chained and sequential": (
        lambda o: lr.SequentialLR(
            o,
            [
                lr.SequentialLR(o, [lr.ConstantLR(o, 0.5, 100), lr.ExponentialLR(o, 0.9)], [3]),
                lr.ChainedScheduler([lr.LinearLR(o, 0.1, 1.0, 5), lr.ExponentialLR(o, 0.8)]),
            ],
            [10],
        ),
        lambda t: (
            0.05
            if t < 3
            else 0.1 * 0.9 ** (t - 3)
            if t < 10
            else 0.1 * (0.1 + 0.9 * min(t - 10, 5) / 5) * 0.8 ** (t - 10)
        ),
    ),
}


@pytest.mark.parametrize("make, closed_form", CASES.values(), ids=CASES)
def test_schedule(make, closed_form):
    assert run(make) == pytest.approx([closed_form(t) for t in range(EPOCHS)], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("make", [case[0] for case in CASES.values()], ids=CASES)
def test_every_group_has_its_own_rate(make):
    optimizer = Groups()
    scheduler = make(optimizer)
    for _ in range(40):
        scheduler.step()
    if isinstance(scheduler, lr.CosineAnnealingLR) and scheduler.eta_min:
        return
    first, second = rates(optimizer)
    assert second == pytest.approx(first * RATES[1] / RATES[0], rel=1e-9, abs=1e-15)
    assert [group["initial_lr"] for group in optimizer.param_groups] == list(RATES)


@pytest.mark.parametrize("stop", [0, 1, 5, 12, 34, 35])
@pytest.mark.parametrize("name", CASES)
def test_resuming_from_a_state_dict(name, stop):
    make, _ = CASES[name]
    whole = run(make)
    optimizer = Groups(momentum=0.9)
    scheduler = make(optimizer)
    for _ in range(stop):
        scheduler.step()
    saved = json.loads(json.dumps([scheduler.state_dict(), optimizer.param_groups]))
    resumed_optimizer = Groups(momentum=0.9)
    resumed = make(resumed_optimizer)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.param_groups = saved[1]
    for expected in whole[stop:]:
        assert rates(resumed_optimizer)[0] == expected
        assert resumed.get_last_lr() == rates(resumed_optimizer)
        resumed.step()


def test_last_epoch_and_base_lrs():
    optimizer = Groups()
    scheduler = lr.ExponentialLR(optimizer, 0.5)
    assert scheduler.last_epoch == 0 and scheduler.base_lrs == list(RATES)
    scheduler.step()
    assert scheduler.last_epoch == 1 and scheduler.base_lrs == list(RATES)


def test_going_on_by_last_epoch():
    optimizer = Groups()
    scheduler = lr.ExponentialLR(optimizer, 0.5)
    for _ in range(4):
        scheduler.step()
    resumed = lr.ExponentialLR(optimizer, 0.5, last_epoch=scheduler.last_epoch - 1)
    assert resumed.last_epoch == 4 and rates(optimizer)[0] == pytest.approx(0.1 * 0.5**4)
    resumed.step()
    assert rates(optimizer)[0] == pytest.approx(0.1 * 0.5**5)
    with pytest.raises(KeyError, match=r"initial_lr.*param_groups\[0\].*last_epoch=3"):
        lr.ExponentialLR(Groups(), 0.5, last_epoch=3)


def test_functions_for_each_group_and_callable_objects():
    class Decay:
        def __init__(self, base):
            self.base = base

        def __call__(self, epoch):
            return self.base**epoch

    optimizer = Groups()
    scheduler = lr.LambdaLR(optimizer, [Decay(0.5), lambda epoch: 1.0])
    scheduler.step()
    assert rates(optimizer) == [0.05, 0.03]
    state = copy.deepcopy(scheduler.state_dict())
    assert state["lr_lambdas"] == [{"base": 0.5}, None]
    other = lr.LambdaLR(Groups(), [Decay(0.9), lambda epoch: 1.0])
    other.load_state_dict(state)
    assert other.lr_lambdas[0].base == 0.5 and other.last_epoch == 1 and state["lr_lambdas"] == [{"base": 0.5}, None]


def test_warm_restarts_at_fractions_of_an_epoch():
    optimizer = Groups()
    scheduler = lr.CosineAnnealingWarmRestarts(optimizer, 3, 2)
    for batch in range(300):
        scheduler.step(batch / 7)
        assert rates(optimizer)[0] == pytest.approx(restarting(batch / 7, 3, 2), abs=1e-12)
        assert scheduler.last_epoch == batch // 7
    with pytest.raises(ValueError, match="non-negative"):
        scheduler.step(-1)


# ---------------------------------------------------------------------- OneCycleLR


def anneal(start, end, share):
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def one_cycle(t, low, high, final):
    """Peak at step 0.3 · 70 − 1 = 20, end at step 69."""
    return anneal(low, high, t / 20) if t <= 20 else anneal(high, final, (t - 20) / 49)


def test_one_cycle():
    def make(optimizer):
        return lr.OneCycleLR(optimizer, max_lr=0.5, total_steps=EPOCHS)

    assert run(make) == pytest.approx([one_cycle(t, 0.5 / 25, 0.5, 0.5 / 25 / 1e4) for t in range(EPOCHS)])
    assert run(make, key="momentum") == pytest.approx([one_cycle(t, 0.95, 0.85, 0.95) for t in range(EPOCHS)])


def test_one_cycle_in_three_phases():
    def closed_form(t, low, high, final):
        points = [(0, low), (0.3 * 100 - 1, high), (2 * 0.3 * 100 - 2, low), (99, final)]
        for (start, a), (end, b) in zip(points, points[1:]):
            if t <= end:
                return a + (b - a) * (t - start) / (end - start)

    optimizer = Groups(betas=(0.9, 0.999))
    scheduler = lr.OneCycleLR(
        optimizer, [0.5, 1.0], epochs=10, steps_per_epoch=10, three_phase=True, anneal_strategy="linear"
    )
    for t in range(100):
        assert rates(optimizer)[1] == pytest.approx(closed_form(t, 0.04, 1.0, 0.04 / 1e4))
        beta, beta2 = optimizer.param_groups[1]["betas"]
        assert beta == pytest.approx(closed_form(t, 0.95, 0.85, 0.95)) and beta2 == 0.999
        scheduler.step()
    with pytest.raises(ValueError, match="Tried to step 101 times.*100"):
        scheduler.step()


def test_one_cycle_resumes():
    optimizer = Groups(momentum=0.9)
    scheduler = lr.OneCycleLR(optimizer, 0.5, total_steps=EPOCHS)
    for _ in range(33):
        scheduler.step()
    state, groups = json.loads(json.dumps([scheduler.state_dict(), optimizer.param_groups]))
    resumed_optimizer = Groups(momentum=0.9)
    resumed = lr.OneCycleLR(resumed_optimizer, 0.5, total_steps=EPOCHS)
    resumed.load_state_dict(state)
    resumed_optimizer.param_groups = groups
    for _ in range(30):
        scheduler.step()
        resumed.step()
        assert resumed_optimizer.param_groups == optimizer.param_groups


def test_one_cycle_refuses():
    def make(optimizer=None, **kwargs):
        return lr.OneCycleLR(optimizer or Groups(momentum=0.9), 0.5, **kwargs)

    for kwargs, words in (
        ({}, "either total_steps OR"),
        ({"total_steps": 0}, "positive integer total_steps, but got 0"),
        ({"epochs": 3, "steps_per_epoch": 1.5}, "steps_per_epoch"),
        ({"total_steps": 10, "pct_start": 2.0}, "pct_start"),
        ({"total_steps": 10, "anneal_strategy": "square"}, "'cos' or 'linear', instead got square"),
        ({"total_steps": 10, "base_momentum": [0.1]}, "base_momentum has 1 values, param_groups has 2"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**kwargs)
    with pytest.raises(ValueError, match="momentum or beta1"):
        make(Groups(), total_steps=10)
    make(Groups(), total_steps=10, cycle_momentum=False)
    make(total_steps=10, pct_start=0.1)  # the first phase has no length


# ---------------------------------------------------------------------- ReduceLROnPlateau


def plateau(metrics, **kwargs):
    optimizer = Groups()
    scheduler = lr.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, **kwargs)
    seen = []
    for metric in metrics:
        scheduler.step(metric)
        assert scheduler.get_last_lr() == rates(optimizer)
        seen.append(round(0.1 / rates(optimizer)[0], 9))
    return seen


def test_plateau_waits_for_more_than_patience_epochs():
    assert plateau([5, 5, 5, 5, 5, 5, 5]) == [1, 1, 1, 2, 2, 2, 4]
    assert plateau([5, 4, 4, 4, 3, 3, 3, 3]) == [1, 1, 1, 1, 1, 1, 1, 2]
    assert plateau([1, 2, 3, 3, 3, 3], mode="max") == [1, 1, 1, 1, 1, 2]
    assert plateau([float("nan")] * 3) == [1, 1, 2]


def test_plateau_threshold_is_relative_or_absolute():
    slow = [100 - 0.5 * epoch for epoch in range(8)]
    assert plateau(slow, threshold=0.1)[-1] == 4
    assert plateau(slow, threshold=0.1, threshold_mode="abs")[-1] == 1
    assert plateau(slow, threshold=1.2, threshold_mode="abs")[-1] == 1
    assert plateau(slow, threshold=1.6, threshold_mode="abs")[-1] == 4
    assert plateau([1.0, 1.05, 1.09, 1.1], threshold=0.1, mode="max")[-1] == 2


def test_plateau_cooldown_and_least_rate():
    assert plateau([5] * 11, cooldown=2) == [1, 1, 1, 2, 2, 2, 2, 2, 4, 4, 4]
    assert plateau([5] * 20, min_lr=0.02)[-1] == 5
    assert plateau([5] * 20, min_lr=[0.05, 0.0])[-1] == 2
    assert plateau([5] * 20, eps=0.03)[-1] == 2


def test_plateau_resumes_and_follows_added_groups():
    metrics = [5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 4]
    optimizer = Groups()
    scheduler = lr.ReduceLROnPlateau(optimizer, patience=1)
    for metric in metrics[:5]:
        scheduler.step(metric)
    state, groups = json.loads(json.dumps([scheduler.state_dict(), optimizer.param_groups]))
    resumed_optimizer = Groups()
    resumed = lr.ReduceLROnPlateau(resumed_optimizer)
    resumed.load_state_dict(state)
    resumed_optimizer.param_groups = groups
    for metric in metrics[5:]:
        scheduler.step(metric)
        resumed.step(metric)
        assert rates(resumed_optimizer) == rates(optimizer)
    optimizer.param_groups.append({"lr": 1.0})
    for _ in range(2):
        scheduler.step(9)
    assert rates(optimizer)[2] == pytest.approx(0.1)


# ---------------------------------------------------------------------- what is refused


def test_what_is_refused():
    for make, error, words in (
        (lambda: lr.StepLR([0.1], 3), TypeError, "list is not an Optimizer"),
        (lambda: lr.ConstantLR(Groups(), 1.5), ValueError, "between 0 and 1, got 1.5"),
        (lambda: lr.LinearLR(Groups(), 0.0), ValueError, "greater than 0"),
        (lambda: lr.LinearLR(Groups(), 1.0, 2.0), ValueError, "between 0 and 1, got 2.0"),
        (lambda: lr.LambdaLR(Groups(), [abs]), ValueError, "lr_lambda has 1 values, param_groups has 2"),
        (lambda: lr.MultiplicativeLR(Groups(), 0.5), TypeError, "should be a function, but got float"),
        (lambda: lr.CosineAnnealingWarmRestarts(Groups(), 0), ValueError, "positive integer T_0"),
        (lambda: lr.CosineAnnealingWarmRestarts(Groups(), 3, 0), ValueError, "T_mult >= 1"),
        (lambda: lr.ReduceLROnPlateau(Groups(), factor=1.0), ValueError, "< 1.0"),
        (lambda: lr.ReduceLROnPlateau(Groups(), mode="low"), ValueError, "'min' or 'max'"),
        (lambda: lr.ReduceLROnPlateau(Groups(), threshold_mode="x"), ValueError, "'rel' or 'abs'"),
        (lambda: lr.ChainedScheduler([]), ValueError, "at least one scheduler"),
        (lambda: lr.SequentialLR(Groups(), [], []), ValueError, "at least one scheduler"),
    ):
        with pytest.raises(error, match=words):
            make()
    one, two = Groups(), Groups()
    schedulers = [lr.StepLR(one, 3), lr.StepLR(two, 3)]
    with pytest.raises(ValueError, match="same optimizer, but StepLR at index 1"):
        lr.ChainedScheduler(schedulers)
    with pytest.raises(ValueError, match="same optimizer, but StepLR at index 1"):
        lr.SequentialLR(one, schedulers, [3])
    with pytest.raises(ValueError, match="2 schedulers and 0 milestones"):
        lr.SequentialLR(one, [schedulers[0], lr.StepLR(one, 2)], [])
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        lr.ChainedScheduler([lr.ReduceLROnPlateau(one)])


def test_a_group_added_later_is_an_error_that_says_so():
    optimizer = Groups()
    scheduler = lr.LambdaLR(optimizer, lambda epoch: 1.0)
    optimizer.param_groups.append({"lr": 1.0})
    with pytest.raises(ValueError, match="2 parameter groups, the optimizer now has 3"):
        scheduler.step()
