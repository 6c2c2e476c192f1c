"""The plain graph: the transformers model, traced by torch's exporter, with its cache as separate tensors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import torch
from torch import Tensor, nn

from compress.models.cache import from_cache, to_cache
from compress.models.description import AttentionBlock, Stack
from compress.onnx.export.graph import OPSET
from compress.onnx.names import PLAIN, cache_names


class _FlatCache(nn.Module):
    """The model as a function of tensors: the exporter does not accept a cache object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=to_cache(past),
            use_cache=True,
        )
        return (output.logits, *from_cache(output.past_key_values))


def plain_graph(model: nn.Module, stack: Stack) -> onnx.ModelProto:
    """Trace the model. Inputs, outputs and dynamic dimensions are those of the decoding graph."""
    attentions = [block for block in stack.blocks if isinstance(block, AttentionBlock)]
    past = [torch.zeros(2, block.kv_heads, 3, block.head_size) for block in attentions for _ in range(2)]
    ids, positions = (
        torch.zeros(2, 2, dtype=torch.long) for _ in range(2)
    )  # the exporter would merge one shared tensor into one input
    cache = {0: "batch_size", 2: "past_sequence_length"}
    new = {0: "batch_size", 1: "sequence_length"}
    layers = range(len(attentions))
    names = {part: [name for n in layers for name in cache_names(part, n)] for part in ("past_key_values", "present")}
    with _quiet():
        program = torch.onnx.export(
            _FlatCache(model).eval(),
            (ids, torch.ones(2, 5, dtype=torch.long), positions, past),
            input_names=["input_ids", "attention_mask", "position_ids", *names["past_key_values"]],
            output_names=["logits", *names["present"]],
            dynamic_shapes=(new, {0: "batch_size", 1: "total_sequence_length"}, new, [cache] * len(past)),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    graph.graph.name = PLAIN
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's own log messages and warnings from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
