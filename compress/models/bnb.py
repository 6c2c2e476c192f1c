"""Load Hugging Face models that bitsandbytes quantizes while transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from compress.errors import ModelError
from compress.models import family_of
from compress.models.loading import load_config

QuantType = Literal["nf4", "fp4", "int8"]


def load_bitsandbytes(directory: Path, quant_type: QuantType, *, device: str = "cpu") -> Any:
    """Load a transformers directory with linear layers in 4-bit NormalFloat, 4-bit float or LLM.int8, in eval mode.

    Unquantized tensors are float32, and 4-bit layers compute in float32. Tied heads and embeddings are not quantized.
    Raises ModelError if bitsandbytes is missing or the directory is not a transformers model.
    """
    if quant_type == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.float32
        )
    seq2seq = family_of(load_config(directory)).task == "seq2seq"
    stock = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    try:
        model = stock.from_pretrained(
            directory,
            quantization_config=settings,
            dtype=torch.float32,
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{directory}: bitsandbytes cannot load it ({str(error).splitlines()[0]})") from error
    return model.eval()


def bitsandbytes_products(model: nn.Module) -> list[Any]:
    """Return the modules that bitsandbytes computes, with their ``in_features`` and ``out_features``."""
    return [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
