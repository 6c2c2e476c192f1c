"""Names that a graph and the runtime agree on; they follow optimum's conventions."""

IN_PLACE = "decoding_in_place"
"""Graph whose past and present caches may be one buffer, longer than what it holds."""
GROWING = "decoding_growing"
"""Graph whose present caches are new tensors, one position longer each step."""
PLAIN = "plain"
"""Graph of torch's exporter; its caches grow too."""
MODEL_FILE = "model.onnx"


def cache_names(prefix: str, layer: int) -> tuple[str, str]:
    """Names of a layer's key and value cache; ``prefix`` is ``past_key_values`` or ``present``."""
    return f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"
