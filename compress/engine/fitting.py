"""Train a student on data: bring student, teacher, terms and rows together and run the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from compress.data import Split
from compress.engine.models import device_of
from compress.models.dropout import set_dropout
from compress.training.config import Group, TrainConfig
from compress.training.forward import Side
from compress.training.loop import Place, Trained, train
from compress.training.objective import LossTerm, Objective
from compress.training.update import OwnResponses


def fit(
    student: Side,
    terms: Sequence[LossTerm],
    config: TrainConfig,
    place: Place,
    *,
    data: Split,
    evaluate: Split | None = None,
    teacher: Side | None = None,
    groups: Mapping[Group, Sequence[nn.Parameter]] | None = None,
    extra: nn.Module | None = None,
    own: OwnResponses | None = None,
) -> Trained:
    """Train the student in place.

    Args:
        student: the model that trains; it is moved to ``place.device``.
        terms: the loss terms; the loss is their weighted sum.
        config: steps, batch, learning rates and so on.
        place: the directory for checkpoints, the device and the seed.
        data: rows to train on.
        evaluate: rows that choose the checkpoint; with None, the last step is kept.
        teacher: a frozen model, or None if no term needs one; it is moved to ``place.device`` too.
        groups: the parameters that train, by kind of learning rate; by default every parameter as ``weights``.
        extra: further state to save in checkpoints.
        own: the sampler for steps that train on the student's own responses.
    """
    device = torch.empty(0, device=place.device).device  # "cuda" becomes "cuda:0"
    for side in filter(None, (student, teacher)):
        if device_of(side.model) != device:  # an 8-bit teacher of bitsandbytes is in place and refuses to be moved
            side.model.to(device)
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    torch.manual_seed(place.seed)
    objective = Objective(student, terms, teacher=teacher, autocast=autocast).to(place.device)
    if extra is not None:
        objective.add_module("extra", extra)
    with torch.enable_grad(), set_dropout(student.model, config.dropout):
        return train(
            objective,
            groups or {"weights": list(student.model.parameters())},
            data,
            evaluate,
            config,
            place,
            own=own,
        )
