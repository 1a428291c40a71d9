"""Stands for the CUDA half of the suite: skipped, with the reason, where there is no CUDA device."""

import numpy as np
import pytest

import gpuad


@pytest.mark.cuda
def test_the_suite_runs_on_cuda():
    ones = gpuad.ones(3, device="cuda:0")
    assert str(ones.device) == "cuda:0"
    np.testing.assert_array_equal((ones + 1).cpu().numpy(), [2, 2, 2])


def test_devices_are_values(device):
    assert gpuad.device(str(device)) is device
    assert gpuad.zeros(2, device=device).device is device
