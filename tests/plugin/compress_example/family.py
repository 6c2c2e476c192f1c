"""Mistral: Llama under another name. A sliding window is refused, because masks and graphs attend to all positions."""

from dataclasses import replace

from compress.models.families.llama import LLAMA

MISTRAL = replace(LLAMA, name="mistral", model_types=("mistral",), refused={"sliding_window": (None,)})
