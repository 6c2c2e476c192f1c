"""Names that a graph and the runtime agree on; they follow optimum's conventions."""

IN_PLACE = "decoding_in_place"
"""Graph whose past and present caches may be one buffer, longer than what it holds."""
GROWING = "decoding_growing"
"""Graph whose present caches are new tensors, one position longer each step."""
PLAIN = "plain"
"""Graph of torch's exporter; its caches grow too."""
LOGITS_FROM = "logits_from"
"""Optional input: the first of the new positions whose logits are computed."""
MODEL_FILE = "model.onnx"
ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_model_merged.onnx"
SHARED_FILE = "shared.onnx_data"
"""Weights that the graphs of an encoder and its decoder both read."""


def cache_names(prefix: str, layer: int, side: str = "") -> tuple[str, str]:
    """Names of a layer's key and value cache; ``prefix`` is ``past_key_values`` or ``present``.

    The decoder of a sequence-to-sequence model has two caches a layer: ``side`` is ``decoder`` for its own tokens,
    ``encoder`` for the states it attends to.
    """
    layer_name = f"{prefix}.{layer}.{side}" if side else f"{prefix}.{layer}"
    return f"{layer_name}.key", f"{layer_name}.value"


def both_caches(layer: int, side: str = "") -> tuple[list[str], list[str]]:
    """Names of a layer's past and present caches, key and value each."""
    past, present = (list(cache_names(prefix, layer, side)) for prefix in ("past_key_values", "present"))
    return past, present
