"""A model in an objective or a measurement (a side), the result of its forward pass, and its likelihood.

Shapes: B batch, T positions, N positions that count in the loss, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.data import Split
from compress.distributed import collectives, processes
from compress.errors import DataError
from compress.models.family import ModelFamily
from compress.models.structure import IGNORE, Projection
from compress.surgery.quantization import prepared

Batch = Mapping[str, Tensor]
"""LongTensors ``input_ids``, ``attention_mask``, ``labels`` (and ``decoder_*`` for sequence-to-sequence models).

``labels[b, t]`` is the token that position t must predict (already aligned). A label of -100 does not count. Terms that
are ``numbered`` also get ``rows`` [B]: the number of each row in the training data."""


@dataclass(frozen=True)
class Side:
    """A model in the objective. ``kept`` and ``layers`` say what it kept of the original model (root).

    ``kept`` is a dict from axis (prunable dimension, such as ``hidden``) to units, and ``layers`` from stack (encoder
    or decoder) to layer numbers. An axis or stack that is not listed kept all.
    """

    model: nn.Module
    family: ModelFamily
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The model's transformers configuration."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Width of the final hidden states, read from the tensors."""
        return self.model.get_submodule(self.family.head).get_parameter("weight").shape[1]

    @cached_property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class View:
    """The result of one forward pass of a side: its final states, and the inner states that a term asked for."""

    side: Side
    batch: Batch
    final_BTD: Tensor
    hidden: tuple[Tensor, ...] = ()
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mask_BT(self) -> Tensor:
        """True where a position of the decoder (or of the only stack) holds a real token."""
        name = "decoder_attention_mask" if self.side.family.task == "seq2seq" else "attention_mask"
        return self.batch[name].bool()

    @property
    def tokens_BT(self) -> Tensor:
        """The token at each position of the decoder (or of the only stack)."""
        return self.batch["decoder_input_ids" if self.side.family.task == "seq2seq" else "input_ids"]

    def projected(self, projection: Projection) -> Tensor:
        """Return the output of a query, key or value projection, [B, T, heads x head size]."""
        return self.outputs[projection.module].chunk(projection.blocks, dim=-1)[projection.block]


def run_body(side: Side, batch: Batch, *, hidden: bool = False) -> Any:
    """Run the model without its head; the output has ``last_hidden_state`` [B, T, D]."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "rows")}
    body = side.model.get_submodule(side.family.body)
    return body(**inputs, output_hidden_states=hidden, use_cache=False, return_dict=True)


@contextmanager
def watch(model: nn.Module, modules: set[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the named modules during one forward pass."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in modules:
            handle = model.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: outputs.__setitem__(name, output)
            )
            stack.callback(handle.remove)
        yield outputs


def nll(side: Side, batch: Batch) -> tuple[float, int]:
    """Return the summed negative log-likelihood in nats of the N positions, and N. Computed without gradient."""
    with torch.no_grad():
        labels_BT = batch["labels"]
        scored = labels_BT != IGNORE
        states_ND = run_body(side, batch).last_hidden_state[scored]
        labels_N = labels_BT[scored]
        size = chunk_size(side, states_ND.device)
        sums = [
            F.cross_entropy(
                logits_of(side, states_ND[at : at + size]), labels_N[at : at + size], reduction="sum"
            ).double()
            for at in range(0, len(labels_N), size)
        ]
    return (float(torch.stack(sums).sum()) if sums else 0.0), len(labels_N)


def mean_nll(side: Side, data: Split, batch: int, dtype: torch.dtype | None) -> float:
    """Return the mean negative log-likelihood, in nats, of the ``data.eval`` tokens that count in the loss.

    The processes share its batches. Matrix products run in ``dtype``, or in float32 for None. Raises DataError if no
    token counts.
    """
    totals = [0.0, 0.0]
    with (
        torch.no_grad(),
        prepared(side.model, dtype),
        torch.autocast(side.device.type, dtype, enabled=dtype is not None),
    ):
        for rows in islice(data.loader(batch), processes.rank(), None, processes.count()):
            value, count = nll(side, {name: tensor.to(side.device) for name, tensor in rows.items()})
            totals[0] += value
            totals[1] += count
    total, tokens = collectives.means(totals)
    if not tokens:
        raise DataError("data.eval has no tokens that count in the loss")
    return total / tokens


def chunk_size(side: Side, device: torch.device) -> int:
    """Return how many tokens have their logits in memory at once, at least 256.

    The logits are about 2^22 numbers on a CPU (to fit its cache) and 2^26 on a GPU. The minimum exists because each
    chunk computes a gradient of the whole head, which is too costly for a few tokens.
    """
    vocabulary = side.model.get_submodule(side.family.head).get_parameter("weight").shape[0]
    return int(max(256, 2 ** (22 if device.type == "cpu" else 26) // vocabulary))


def logits_of(side: Side, states: Tensor) -> Tensor:
    """Return the logits [N, V] of final states [N, D], in float32 or wider."""
    logits = side.family.logits(side.model, states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
