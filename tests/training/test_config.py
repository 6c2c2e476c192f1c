"""How a stage trains: lengths, schedules, groups, and what is refused."""

from __future__ import annotations

import pytest
import torch

from compress.training.config import TrainConfig, lr_factor, parameter_groups


def _config(**options):
    return TrainConfig.model_validate({"steps": 12, "lr": 1e-3} | options)


def test_schedule():
    config = _config(warmup=0.25, schedule="linear")
    factors = [lr_factor(step, 16, config) for step in range(16)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[-1] == pytest.approx(1 / 12)
    cosine = _config(warmup=0, schedule="cosine")
    assert lr_factor(8, 16, cosine) == pytest.approx(0.5)
    assert lr_factor(5, 16, _config(warmup=0, schedule="constant")) == 1.0


def test_decay_touches_weight_matrices_alone(tiny_gpt2):
    model = tiny_gpt2()
    mask = torch.nn.Parameter(torch.ones(4, 4))
    groups = parameter_groups({"weights": list(model.parameters()), "masks": [mask]}, _config())
    for group in groups:
        for parameter in group["params"]:
            is_matrix = parameter is not mask and parameter.ndim > 1
            assert (group["weight_decay"] > 0) == is_matrix
    assert {group["peak"] for group in groups} == {1e-3, 1e-2}


@pytest.mark.parametrize("options", [{}, {"steps": 3, "epochs": 1}])
def test_one_length(options):
    with pytest.raises(ValueError, match="either steps or epochs"):
        TrainConfig.model_validate(options)


@pytest.mark.parametrize("betas", [[0.9, 1], [-0.1, 0.9], [0.9]])
def test_betas_are_those_adam_takes(betas):
    with pytest.raises(ValueError, match="betas"):
        _config(betas=betas)


def test_a_tracker_that_is_not_installed_is_refused():
    with pytest.raises(ValueError, match="'sensorboard' is not installed"):
        _config(trackers=["sensorboard"])
