"""Checkpoints of a training run as safetensors: parameters, optimizer, random state and progress; no pickle.

Every process of a run calls the same functions; the main process writes, and all read what it wrote.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress import collective, processes


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
        """Write a checkpoint under a temporary name, rename it, then drop older ones."""
        random = {name: collective.gathered(state) for name, state in _random_state().items()}
        if processes.is_main():
            self._write(model, optimizer, progress, random)
        collective.wait()

    def _write(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, random: dict[str, Tensor]
    ) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary, final = self.directory / "partial", self.directory / f"step-{progress.step:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(unique_state(model), temporary / "model.safetensors")
        save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        save_file(random, temporary / "random.safetensors")
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)))
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        for older in sorted(self.directory.glob("step-*"))[:-1]:
            shutil.rmtree(older)

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return max(self.directory.glob("step-*"), default=None)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Load the newest checkpoint into model, optimizer and the random state; None when there is none."""
        path = self.latest()
        if path is None:
            return None
        _load_state(model, load_file(path / "model.safetensors"))
        _load_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
        _restore_random_state(load_file(path / "random.safetensors"))
        return Progress(**json.loads((path / "progress.json").read_text()))

    def keep_best(self, model: nn.Module) -> None:
        """Keep these weights as the best so far."""
        if not processes.is_main():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / "best.partial"
        save_file(unique_state(model), temporary)
        temporary.rename(self.directory / "best.safetensors")

    def restore_best(self, model: nn.Module) -> None:
        """Load the best weights back."""
        collective.wait()  # for the main process to have written them
        _load_state(model, load_file(self.directory / "best.safetensors"))
        collective.wait()  # before it may remove them


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


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _restore_random_state(saved: dict[str, Tensor]) -> None:
    """Take this process's part of what was saved; a process that had none keeps the state it was seeded with."""
    state = _random_state()
    for name, own in state.items():
        parts = saved.get(name, own[:0]).view(-1, len(own))
        if processes.rank() < len(parts):
            state[name] = parts[processes.rank()].clone()
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
