"""Names shared by the graphs and the runtime; they follow optimum's conventions."""

IN_PLACE = "decoding_in_place"
"""A graph whose past and present cache may be the same buffer, longer than the text so far."""
GROWING = "decoding_growing"
"""A graph whose present caches are new tensors, longer by the new tokens."""
PLAIN = "plain"
"""The graph of torch's exporter; its caches grow too."""
LOGITS_FROM = "logits_from"
"""Optional input: the first new position whose logits are computed."""
MODEL_FILE = "model.onnx"
ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_model_merged.onnx"
SHARED_FILE = "shared.onnx_data"
"""The weights that both the encoder's and the decoder's graph read."""


def cache_names(prefix: str, layer: int, side: str = "") -> tuple[str, str]:
    """Return the names of a layer's key and value cache; ``prefix`` is ``past_key_values`` or ``present``.

    The decoder of an encoder-decoder model has two caches per layer: ``side`` is ``decoder`` for its own tokens and
    ``encoder`` for the encoder's states.
    """
    layer_name = f"{prefix}.{layer}.{side}" if side else f"{prefix}.{layer}"
    return f"{layer_name}.key", f"{layer_name}.value"


def both_caches(layer: int, side: str = "") -> tuple[list[str], list[str]]:
    """Return the names of a layer's past and present caches, key and value each."""
    past, present = (list(cache_names(prefix, layer, side)) for prefix in ("past_key_values", "present"))
    return past, present
