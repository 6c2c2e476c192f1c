"""``python -m tests.sharing DIRECTORY``: train in each way that processes may share; tests compare what is left.

Each process leaves the gradients of every update, the state at the end, and its curves, under its number.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from compress.data import DataSpec, ModelInterface, open_data
from compress.distributed import collectives, processes
from compress.engine.masking import _Scores
from compress.generation.on_policy import OnPolicy, StudentResponses
from compress.generation.subject import TorchSubject
from compress.models import family_of
from compress.models.dropout import set_dropout
from compress.registry import TERMS
from compress.surgery.masks import attach, masks_of
from compress.surgery.quantization import EmbeddingQuantization, Quantization, WeightQuantization, quantize
from compress.training.config import TrainConfig
from compress.training.forward import Side
from compress.training.loop import Place, train
from compress.training.objective import Objective
from tests.conftest import _bart, _gpt2

WAYS = ("distilled", "uneven", "unused", "masked", "curved", "own")
STEPS = 3


def write_rows(directory: Path) -> None:
    """Rows of one length, and pairs of many."""
    generator = torch.Generator().manual_seed(0)

    def ids(size: int) -> list[int]:
        return torch.randint(3, 67, (size,), generator=generator).tolist()

    even = [{"ids": ids(9)} for _ in range(24)]
    uneven = [{"ids": ids(4 + i % 5), "labels": ids(2 + 3 * i % 11)} for i in range(25)]
    for name, rows in (("even", even), ("uneven", uneven)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def way(name: str) -> tuple[Objective, dict[Any, list[nn.Parameter]], dict[str, Any]]:
    """What one way trains: objective, parameter groups, and settings."""
    torch.manual_seed(0)
    make = _bart if name == "uneven" else _gpt2
    student, teacher = make(seed=2), make(seed=1)
    terms: list[Any] = ["forward_kl", "cross_entropy"]
    config: dict[str, Any] = {"batch": 8}
    if name == "distilled":
        terms += [{"type": "token_contrastive", "size": 8}, "hidden_mse"]
        config |= {"accumulate": 2}
    if name == "uneven":
        terms.append({"type": "token_contrastive", "size": 8, "bank": "position"})
        config = {"batch": 5}
    if name == "own":
        terms, config = ["forward_kl"], {"batch": 5, "accumulate": 2}
    if name == "unused":
        terms, config = ["causal_kv"], {"batch": 8, "accumulate": 2}
    sides = [Side(model, family_of(model.config)) for model in (student, teacher)]
    groups: dict[Any, list[nn.Parameter]] = {}
    extra = None
    if name == "masked":
        student.requires_grad_(False)
        attach(student, sides[0].family, ["hidden", "heads", "ffn"])
        terms.append({"type": "mask_l1", "weight": 1e-2})
        groups["masks"] = list(masks_of(student).values())
        extra = _Scores(masks_of(student), "loss_aware")
    if name == "curved":
        weights = WeightQuantization(bits=4, method="laq")
        quantize(student, sides[0].family, Quantization(weights=weights, embedding=EmbeddingQuantization(bits=4)))
        config["lr"] = 0.0  # or a weight near a bin's edge goes either way
    objective = Objective(sides[0], [TERMS.read(term) for term in terms], teacher=sides[1])
    if extra is not None:
        objective.add_module("extra", extra)
    return objective, groups or {"weights": list(student.parameters())}, config


def trained(name: str, directory: Path, out: Path, **changes: Any) -> dict[str, Tensor]:
    """Train one way, and return the gradients of each update and the state at the end."""
    objective, groups, config = way(name)
    source: dict[str, Any] = {"json": "even.jsonl", "input_ids": "ids"}
    if name == "uneven":
        source = {"json": "uneven.jsonl", "input_ids": "ids", "labels": "labels"}
    spec = DataSpec.model_validate({"train": source, "eval": source})
    interface = ModelInterface.of(objective.student.config)  # type: ignore[arg-type]
    data = open_data(spec, tokenizer=None, model=interface, base=directory)
    own = None
    if name == "own":  # the likeliest token, or each process would draw others; and ends enough for many lengths
        asked = OnPolicy(fraction=0.2, max_new_tokens=8, top_k=1)
        subject = TorchSubject(objective.sides[0], None, [6, 7, 15, 30, 50])  # type: ignore[arg-type]
        own = StudentResponses(asked, subject, interface, seed=3, autocast=None)
        assert 0 < sum(map(own.chosen, range(STEPS))) < STEPS
    found: dict[str, Tensor] = {}

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        step = len({key.split(".")[1] for key in found})
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        found.update(
            {f"gradient.{step}.{i}": each.grad.clone() for i, each in enumerate(parameters) if each.grad is not None}
        )

    out.mkdir(exist_ok=True)
    settings = {
        "steps": STEPS,
        "lr": 1e-5,
        "warmup": 0.0,
        "precision": "fp32",
        "eval_every": 2,
        "dropout": 0.0,
        "clip": None,
    }
    training = TrainConfig.model_validate(settings | config | changes)
    hook = register_optimizer_step_pre_hook(record)
    try:
        with set_dropout(objective.student, training.dropout):
            place = Place(out, seed=3, bar=False)
            train(objective, groups, data.train, data.eval, training, place, own=own)  # type: ignore[arg-type]
    finally:
        hook.remove()
    return found | {f"state.{key}": value.clone() for key, value in objective.state_dict().items()}


def interrupted(directory: Path, out: Path, **changes: Any) -> bool:
    """Train until the last process, alone, is asked to stop; return whether this one stopped."""
    calls, original = {"n": 0}, Objective.forward

    def forward(self: Objective, batch: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 4 and processes.rank() == processes.count() - 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    Objective.forward = forward  # type: ignore[method-assign]
    try:
        trained("distilled", directory, out, **changes)
    except KeyboardInterrupt:
        return True
    finally:
        Objective.forward = original  # type: ignore[method-assign]
    return False


def main(directory: Path) -> None:
    """Do all of it in this process."""
    collectives.join("cpu")

    def place(name: str) -> Path:
        return directory / f"{name}-{processes.rank()}"

    def keep(name: str, make: Callable[[Path], dict[str, Tensor]]) -> None:
        save_file({key: value.contiguous() for key, value in make(place(name)).items()}, place(name) / "found")

    for name in WAYS:
        keep(name, lambda out, name=name: trained(name, directory, out))  # type: ignore[misc]
    long = {"steps": 6, "dropout": 0.2, "accumulate": 1, "checkpoint_every": 2}
    keep("straight", lambda out: trained("distilled", directory, out, **long))
    if interrupted(directory, place("resumed"), **long):
        place("resumed").joinpath("stopped").touch()
    keep("resumed", lambda out: trained("distilled", directory, out, **long))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
