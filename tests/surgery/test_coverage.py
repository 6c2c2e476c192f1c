"""Coverage counts what training could change: each parameter once, and modules that own one."""

from __future__ import annotations

from typing import Any

import pytest

from compress.errors import NothingDoneError
from compress.surgery.coverage import Coverage, owners


def test_all_of_a_model_trains(tiny_gpt2: Any) -> None:
    for tie in (True, False):
        model = tiny_gpt2(tie=tie)
        covered = Coverage.of_training(model)
        assert covered.modules_touched == covered.modules_total == len(owners(model))
        assert covered.parameters_touched == covered.parameters_total == model.num_parameters()
        saved = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in saved)
        assert covered.bytes_before == covered.bytes_after == size


def test_only_what_requires_a_gradient_counts_as_touched(tiny_gpt2: Any) -> None:
    model = tiny_gpt2()
    model.requires_grad_(False)
    with pytest.raises(NothingDoneError, match="training: none of"):
        Coverage.of_training(model).require("training")
    model.transformer.h[0].mlp.c_fc.bias.requires_grad_(True)
    covered = Coverage.of_training(model)
    covered.require("training")
    assert (covered.modules_touched, covered.parameters_touched) == (1, model.transformer.h[0].mlp.c_fc.bias.numel())
    assert covered.parameters_total == model.num_parameters()


def test_a_shared_parameter_counts_once_and_touches_both_its_modules(tiny_gpt2: Any) -> None:
    model = tiny_gpt2(tie=True)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    covered = Coverage.of_training(model)
    assert (covered.modules_touched, covered.parameters_touched) == (2, model.lm_head.weight.numel())
