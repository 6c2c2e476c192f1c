"""Checkpoints of a training run as safetensors: parameters, optimizer, random state and progress; no pickle.

Every process of a run calls the same functions. The main process writes, and all processes read what it wrote.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.distributed import collectives, processes
from compress.files import publish, require_whole

_MODEL, _OPTIMIZER, _RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"
_PROGRESS, _BEST = "progress.json", "best.safetensors"


@dataclass
class Progress:
    """The current step of a run, and its best and its last evaluation so far."""

    step: int = 0
    best_nll: float | None = None
    best_step: int | None = None
    last_nll: float | None = None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage in ``directory``: the last complete one, and the best weights."""

    directory: Path

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a complete checkpoint or none, then remove all others. An existing one of this step is kept."""
        random = {name: collectives.gathered(state) for name, state in _random_state().items()}
        if processes.is_main():
            self._write(model, optimizer, progress, random)
        collectives.wait()

    def _write(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, random: dict[str, Tensor]
    ) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary, final = self.directory / "partial", self.directory / f"step-{progress.step:08d}"
        if not final.exists():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_file(unique_state(model), temporary / _MODEL)
            save_file(_optimizer_tensors(optimizer), temporary / _OPTIMIZER)
            save_file(random, temporary / _RANDOM)
            (temporary / _PROGRESS).write_text(json.dumps(asdict(progress)))
            publish(temporary, final, replace=True)
        for other in self.directory.glob("step-*"):
            if other != final:
                shutil.rmtree(other)

    def latest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        return max(self.directory.glob("step-*"), default=None)

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        best: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> Progress | None:
        """Load the newest complete checkpoint into model, optimizer and random state. Return None if there is none.

        A checkpoint that cannot be read is reported and removed. ``best`` says that the best weights are needed later.
        A checkpoint that names best weights is then incomplete without their file.
        """
        with collectives.main_first():  # it removes damaged checkpoints, so the others find complete ones only
            found = self._newest(best, report)
        if found is None:
            return None
        path, progress = found
        _load_state(model, load_file(path / _MODEL))
        _load_optimizer(optimizer, load_file(path / _OPTIMIZER))
        _restore_random_state(load_file(path / _RANDOM))
        return progress

    def _newest(self, best: bool, report: Callable[[str], None] | None) -> tuple[Path, Progress] | None:
        for path in sorted(self.directory.glob("step-*"), reverse=True):
            try:
                return path, self._whole(path, best)
            except _TornError as error:
                if report:
                    report(f"{path} cannot be read ({error})")
                shutil.rmtree(path)
        return None

    def keep_best(self, model: nn.Module) -> None:
        """Keep these weights as the best so far."""
        if not processes.is_main():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / "best.partial"
        save_file(unique_state(model), temporary)
        publish(temporary, self.directory / _BEST, replace=True)

    def restore_best(self, model: nn.Module) -> None:
        """Load the best weights back."""
        collectives.wait()  # until the main process has written them
        _load_state(model, load_file(self.directory / _BEST))
        collectives.wait()  # until all have read them; the main process may remove them afterwards

    def _whole(self, path: Path, best: bool) -> Progress:
        """Check that every file of a checkpoint is complete, and return its progress."""
        file = path / _PROGRESS
        try:
            progress = Progress(**json.loads(file.read_text()))
            files = [path / name for name in (_MODEL, _OPTIMIZER, _RANDOM)]
            if best and progress.best_step is not None:
                files.append(self.directory / _BEST)
            for file in files:
                require_whole(file)
        except (OSError, ValueError, TypeError) as error:
            raise _TornError(f"{file.name}: {' '.join(str(error).split())}") from None
        return progress


class MemoryCheckpoints:
    """Keeps the best weights of a run without a directory in memory. Such a run cannot be resumed."""

    def __init__(self) -> None:
        self._best: dict[str, Tensor] = {}

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Do nothing, because there is no directory to write to."""

    def latest(self) -> None:
        """There is no checkpoint on disk."""

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        best: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """There is nothing to resume from."""

    def keep_best(self, model: nn.Module) -> None:
        """Keep a copy of these weights as the best so far."""
        self._best = {name: tensor.clone() for name, tensor in unique_state(model).items()}

    def restore_best(self, model: nn.Module) -> None:
        """Load the best weights back."""
        _load_state(model, self._best)


class _TornError(Exception):
    """A file of a checkpoint is missing or incomplete."""


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model, contiguous and on the CPU. A shared tensor appears once, under its first name."""
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


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _restore_random_state(saved: dict[str, Tensor]) -> None:
    """Restore this process's part of the saved states. A process without a saved part keeps its seeded state."""
    state = _random_state()
    for name, own in state.items():
        parts = saved.get(name, own[:0]).view(-1, len(own))
        if processes.rank() < len(parts):
            state[name] = parts[processes.rank()].clone()
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
