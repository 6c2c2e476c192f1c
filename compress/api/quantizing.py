"""Quantize a model in place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from compress.api.arguments import configured, refuse_idle, renamed
from compress.engine.models import ancestry_of, checked, remember
from compress.errors import NothingDoneError, UserError
from compress.problem import Location
from compress.surgery.coverage import Coverage
from compress.surgery.quantization import Filter, Quantization, method_of, plan, quantize

WEIGHTS = 4
"""Default bits of the linear layers."""


def quantize_(
    model: nn.Module,
    *,
    weights: int = WEIGHTS,
    embedding: int | None = None,
    activations: Literal[8] | Mapping[str, Any] | None = 8,
    granularity: Literal["tensor", "row", "group"] | None = None,
    group_size: Literal[32, 64, 128] | None = None,
    method: str = "dynamic_scaling",
    init: Literal["search", "one"] = "search",
    filter: Filter | None = None,  # noqa: A002  (the name that torchao gave it)
) -> Coverage:
    """Quantize the linear layers, the token embedding and the language-model head of a model, in place.

    The model keeps its float weights, which :func:`compress.distill` or :func:`compress.finetune` can train
    (quantization-aware training); without training this is post-training quantization. :func:`compress.save` and
    :func:`compress.export_onnx` write packed codes. The default method is the module-wise dynamic scaling of QuantGPT
    (Tao et al., ACL 2022, section 3.2): w_q = alpha round(clip(w, -alpha, alpha) n / alpha) / n with alpha = gamma
    mean|w| and n = 2^(bits - 1) - 1.

    Args:
        model: a float32 model without masks and without quantization.
        weights: bits of the linear layers: 2, 3, 4 or 8. 3-bit codes are stored in 4 bits.
        embedding: bits of the token embedding and of the head; by default those of the weights.
        activations: 8 quantizes the input of each linear layer as the deployed kernel does, symmetric per row and
            block; None leaves inputs in float32 (weight-only). A mapping gives all settings as in a recipe, such as
            ``{"granularity": "tensor", "symmetric": True}``.
        granularity: scales of the linear layers: one per ``tensor`` (the default), per ``row`` or per ``group``.
        group_size: number of weights of a row that share a scale; implies ``granularity="group"``. The embedding and
            the head have one scale per row, or one per group of this size.
        method: ``dynamic_scaling``, ``pact``, ``lsq``, ``laq``, ``twn`` or ``round_to_nearest``.
        init: initial value of the learned scales of ``dynamic_scaling``, ``pact`` and ``lsq``: the value with the
            least squared error, or the method's own.
        filter: a function. ``filter(name, module)`` returns true for the modules to quantize; by default all of them.
            Modules that share a weight are quantized together.

    Returns:
        The coverage: how many modules and parameters were quantized, and bytes before and after packing.

    Raises:
        UserError: an argument cannot be used. The model is unchanged.
        NothingDoneError: the filter matches nothing.

    Examples:
        >>> coverage = compress.quantize_(model, weights=4, group_size=32, filter=lambda name, module: "mlp" in name)
        >>> coverage.modules_touched
        4
    """
    family = checked(model, "model", forbids=("masked", "quantized"))
    grouped = {"group_size": group_size} if group_size is not None else {}
    scales = {"granularity": granularity} if granularity is not None else {}
    products: dict[str, Any] = {"bits": weights, "method": method, "init": init, **scales, **grouped}
    table = {"bits": weights if embedding is None else embedding, **grouped}
    with renamed(_argument):
        config = configured(
            Quantization,
            weights=products,
            embedding=table,
            activations=activations if isinstance(activations, Mapping | None) else {"bits": activations},
        )
    if method_of(config.weights.method).start is None and init != "search":
        refuse_idle(["init"], {"init": f"method {method} has no scale that is learned"})
    _require_filter(filter)
    spec = plan(model, family, config, filter)
    if not spec.matrices:
        raise NothingDoneError("filter: matches no linear layer, embedding or head of this model")
    tables = [matrix for matrix in spec.matrices if matrix.module in (*family.embeddings, family.head)]
    if not tables and embedding is not None:
        refuse_idle(["embedding"], {"embedding": "filter matches neither the embedding nor the head"})
    if len(tables) == len(spec.matrices):
        given = {"granularity": granularity is not None, "weights": embedding is not None and weights != WEIGHTS}
        idle = dict.fromkeys(given, "filter matches no linear layer except the head")
        refuse_idle((name for name, changed in given.items() if changed), idle)
    known = ancestry_of(model, family)
    coverage = quantize(model, family, config, spec)
    remember(model, known)
    return coverage


def _argument(path: Location) -> Location:
    """Return ``method`` for ``weights.method``, and ``weights`` for ``weights.bits``."""
    part, field = (*path, "", "")[:2]
    if part not in ("weights", "embedding") or not field:
        return path
    return (part,) if field == "bits" else (field,)


def _require_filter(select: Any) -> None:
    if select is None:
        return
    if not callable(select) or isinstance(select, nn.Module | type):
        raise UserError(f"filter: expected a function such as lambda name, module: True, got {type(select).__name__}")
    try:
        inspect.signature(select).bind("name", nn.Identity())
    except TypeError:
        raise UserError("filter: expected a function of two arguments, such as lambda name, module: True") from None
    except ValueError:
        return  # a builtin without a signature
