"""What a function of the API must leave as it was."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a function must leave as it was."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    dropout = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return {
        "tensors": tensors,
        "modes": [module.training for module in model.modules()],
        "requires": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "hooks": hooks,
        "dropout": dropout,
        "own": set(model.__dict__),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any], *, weights: bool = True) -> None:
    for name in before:
        if name == "tensors":
            assert before[name].keys() == after[name].keys()
            same = all(torch.equal(before[name][key], after[name][key]) for key in before[name])
            assert same or not weights
        else:
            assert before[name] == after[name], name
