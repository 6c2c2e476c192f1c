"""Random models of one shape, whole and cut, as stock directories and as the graphs of this project."""

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contender import Contender, Run, Skipped, finished
from transformers import BartConfig, GPT2Config

from compress.artifact import Artifact, Step, adopt, seal
from compress.errors import CompressError, ParityError, UserError
from compress.measure.floor import model_step_bytes
from compress.measure.peak import measure_in_fresh_process
from compress.measure.torch_stepper import TorchStepper
from compress.measure.workload import OnnxStepper, Times, Workload, timed_pass
from compress.models import family_of
from compress.models.loading import build
from compress.models.stock_files import copy_settings
from compress.models.structure import sized_axes, stock_tensors
from compress.onnx.export.exporter import Packed, write_graphs
from compress.onnx.export.parity.check import check_parity
from compress.onnx.step_bytes import directory_step_bytes
from compress.stages.bitsandbytes import BitsAndBytes
from compress.stages.stage import Context
from compress.surgery.cut import cut
from compress.surgery.quantization import Quantization, packed_state, quantize

BITS = {"8-8-8": 8, "4-4-8": 4, "2-2-8": 2}
"""Weights, embedding (activations have 8)."""
STORED_CUT = {"scales": "float16", "positions": "float16"}
"""How cut models are packed: what takes no codes weighs more in them."""
CUTS = {"8of12": 8, "6of12": 6}
"""Twelfths of every axis that are kept."""
STOCK, SEALED = "stock", "sealed"


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; ``model`` is gpt2 or bart, which has ``layers`` on either side."""

    model: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    positions: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Shape":
        if options.heads % 6 or options.hidden % options.heads:
            raise UserError(f"--heads: {options.heads} is not a multiple of 6 that divides --hidden {options.hidden}")
        return cls(**{name: getattr(options, name) for name in cls.__dataclass_fields__})

    def parameters(self) -> int:
        """Numbers of the whole model, shared ones once."""
        with torch.device("meta"):
            return sum(tensor.numel() for tensor in stock_tensors(build(self.config())))

    def config(self) -> Any:
        if self.model == "gpt2":
            sizes = {"n_embd": self.hidden, "n_layer": self.layers, "n_head": self.heads}
            return GPT2Config(
                vocab_size=self.vocabulary, n_positions=self.positions, bos_token_id=0, eos_token_id=0, **sizes
            )
        sides = {
            f"{side}_{name}": size
            for side in ("encoder", "decoder")
            for name, size in (("layers", self.layers), ("attention_heads", self.heads), ("ffn_dim", 4 * self.hidden))
        }
        sizes = {"vocab_size": self.vocabulary, "max_position_embeddings": self.positions, "d_model": self.hidden}
        return BartConfig(**sizes, **sides, forced_eos_token_id=None)


def claim(shape: Shape, root: Path) -> None:
    """Note the shape of the models in a directory; UserError if it contains models of another shape."""
    note, wanted = root / "shape.json", vars(shape)
    root.mkdir(parents=True, exist_ok=True)
    if note.exists() and json.loads(note.read_text()) != wanted:
        raise UserError(
            f"--keep: {root} contains models of another shape; name a new directory or give {note.read_text()}"
        )
    note.write_text(json.dumps(wanted))


def stock(shape: Shape, root: Path, twelfths: int = 12) -> Path:
    """A directory of a random model, cut to its first units."""
    directory = root / (STOCK if twelfths == 12 else f"{twelfths}of12-{STOCK}")

    def make(out: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        model: Any = build(shape.config())
        family = family_of(model.config)
        axes = sized_axes(model, family)
        if twelfths < 12:
            cut(model, family, {axis.name: range(axis.size * twelfths // 12) for axis in axes})
        model.save_pretrained(out)
        return {"parameters": sum(tensor.numel() for tensor in stock_tensors(model))}

    finished(directory, make)
    return directory


def own(shape: Shape, root: Path, threads: int) -> Iterator[Contender]:
    """The graphs of this project: float, packed, and both of the cut models."""
    for bits in (None, *BITS):
        yield exported(stock(shape, root), root / (bits or "float"), bits, threads)
    for name, twelfths in CUTS.items():
        for bits in (None, "2-2-8"):
            yield exported(stock(shape, root, twelfths), root / f"{name}-{bits or 'float'}", bits, threads)


def exported(source: Path, directory: Path, bits: str | None, threads: int) -> Contender:
    """One export, made if it does not exist."""
    facts = finished(directory, partial(export_own, source, bits))
    return Contender(
        name=directory.name,
        files=tuple(directory.glob("*.onnx*")),
        open=lambda: passes(OnnxStepper(directory, threads)),
        fresh=partial(measure_in_fresh_process, directory, "onnx"),
        step_bytes=lambda: directory_step_bytes(directory),
        facts=facts,
    )


def export_own(source: Path, bits: str | None, out: Path) -> dict[str, Any]:
    """Write the graphs of a stock directory, float or packed, and say how long that took and what the check found."""
    artifact = adopt(source)
    model = artifact.model()
    copy_settings(source, out)
    start = time.perf_counter()
    packed = None
    if bits is not None:
        settings = {"weights": {"bits": BITS[bits], "method": "round_to_nearest"}, "embedding": {"bits": BITS[bits]}}
        config = Quantization.model_validate(
            settings | {"store": STORED_CUT if source.name.startswith(tuple(CUTS)) else {}}
        )
        quantize(model, artifact.family(), config)
        tensors, spec = packed_state(model.eval(), config.store)
        packed = Packed(spec, tensors)
    packing = time.perf_counter()
    write_graphs(model, out, packed=packed)
    written = time.perf_counter()
    return {
        "packing_s": packing - start,
        "writing_s": written - packing,
        "check": _checked(model, out, packed),
        "check_s": time.perf_counter() - written,
    }


def _checked(model: torch.nn.Module, out: Path, packed: Packed | None) -> Mapping[str, float] | str:
    """Its figures, or what it found wrong: times of random weights are worth reading even so."""
    try:
        return check_parity(model, out, packed.spec if packed else None)
    except ParityError as error:
        return str(error)


def eager(shape: Shape, root: Path) -> Iterator[Contender]:
    """Torch in eager mode, the whole model and the cut ones."""
    for name, twelfths in (("torch", 12), *((f"torch-{name}", kept) for name, kept in CUTS.items())):
        yield in_torch(name, adopt(stock(shape, root, twelfths)))


def in_torch(name: str, artifact: Artifact) -> Contender:
    return Contender(
        name=name,
        files=tuple(artifact.path.glob("*.safetensors")),
        open=lambda: passes(TorchStepper.of(artifact, "cpu")),
        fresh=partial(measure_in_fresh_process, artifact.path, "torch"),
        step_bytes=lambda: model_step_bytes(artifact.model()),
    )


def bitsandbytes(quant_type: Any, shape: Shape, root: Path) -> Contender:
    """The stock library's own quantization, through the stage of this project."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # logs a cast at every product
    source, directory = adopt(stock(shape, root)), root / f"bitsandbytes-{quant_type}"

    def make(out: Path) -> dict[str, Any]:
        unfinished = out / "unfinished"
        unfinished.mkdir(exist_ok=True)
        try:
            result = BitsAndBytes(quant_type=quant_type).run(source, unfinished, Context(models={}))
        except CompressError as error:
            raise Skipped(str(error)) from None
        step = Step(stage="b", type="bitsandbytes", version=1, config={}, seed=0, inputs={}, packages={}, seconds=0)
        seal(unfinished, out / SEALED, parent=source, traits=sorted(result.traits), step=step, kept=result.kept)
        return {}

    finished(directory, make)
    return in_torch(directory.name, adopt(directory / SEALED))


def passes(stepper: Any) -> Run:
    """A stepper as what is timed."""

    def run(work: Workload) -> Times:
        return timed_pass(stepper, work)

    return run
