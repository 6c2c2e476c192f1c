"""Checkpoints of a training run as safetensors: parameters, optimizer, random state and progress; no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.files import publish

_MODEL, _OPTIMIZER, _RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"
_PROGRESS, _BEST = "progress.json", "best.safetensors"


@dataclass
class Progress:
    """How far a run has come, and its best evaluation so far."""

    step: int = 0
    best_nll: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage in ``directory``: the last whole one, and the best weights."""

    directory: Path

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a checkpoint whole or not at all, then drop the others; where this step has one, it is the same."""
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary, final = self.directory / "partial", self.directory / f"step-{progress.step:08d}"
        if not final.exists():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_file(unique_state(model), temporary / _MODEL)
            save_file(_optimizer_tensors(optimizer), temporary / _OPTIMIZER)
            random = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                random["cuda"] = torch.cuda.get_rng_state()
            save_file(random, temporary / _RANDOM)
            (temporary / _PROGRESS).write_text(json.dumps(asdict(progress)))
            publish(temporary, final)
        for other in self.directory.glob("step-*"):
            if other != final:
                shutil.rmtree(other)

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        return max(self.directory.glob("step-*"), default=None)

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        best: bool = False,
        tell: Callable[[str], None] | None = None,
    ) -> Progress | None:
        """Load the newest whole checkpoint into model, optimizer and the random state; None when there is none.

        One that cannot be read is told and removed. ``best``: the best weights will be asked for, so a checkpoint that
        speaks of them is not whole without them.
        """
        for path in sorted(self.directory.glob("step-*"), reverse=True):
            try:
                progress = self._whole(path, best)
            except _TornError as error:
                if tell:
                    tell(f"{path} cannot be read ({error})")
                shutil.rmtree(path)
                continue
            _load_state(model, load_file(path / _MODEL))
            _load_optimizer(optimizer, load_file(path / _OPTIMIZER))
            random = load_file(path / _RANDOM)
            torch.set_rng_state(random["cpu"])
            if "cuda" in random and torch.cuda.is_available():
                torch.cuda.set_rng_state(random["cuda"])
            return progress
        return None

    def keep_best(self, model: nn.Module) -> None:
        """Keep these weights as the best so far."""
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / "best.partial"
        save_file(unique_state(model), temporary)
        publish(temporary, self.directory / _BEST)

    def restore_best(self, model: nn.Module) -> None:
        """Load the best weights back."""
        _load_state(model, load_file(self.directory / _BEST))

    def _whole(self, path: Path, best: bool) -> Progress:
        """The progress of a checkpoint, once every file that goes with it was found whole."""
        file = path / _PROGRESS
        try:
            progress = Progress(**json.loads(file.read_text()))
            files = [path / name for name in (_MODEL, _OPTIMIZER, _RANDOM)]
            if best and progress.best_step is not None:
                files.append(self.directory / _BEST)
            for file in files:
                with safe_open(file, framework="pt"):
                    """Opening compares the length with what the header says."""
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise _TornError(f"{file.name}: {' '.join(str(error).split())}") from None
        return progress


class _TornError(Exception):
    """A file of a checkpoint is missing or not whole."""


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with each shared tensor once, under the first of its names, contiguous and on the CPU."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().cpu().contiguous()
    return state


def _load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    missing = set(unique_state(model)) - set(state)
    if missing:
        raise RuntimeError(f"checkpoint lacks {', '.join(sorted(missing)[:3])}")
    model.load_state_dict(state, strict=False)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, entry in state.items()
        for key, value in entry.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
