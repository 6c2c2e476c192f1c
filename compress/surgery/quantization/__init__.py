"""Replace linear layers, embeddings and the head by fake-quantized ones, pack them, and restore them bit for bit."""

from compress.surgery.quantization.convert import Filter, plan, quantize
from compress.surgery.quantization.inspection import histograms, mean_cosine
from compress.surgery.quantization.methods import method_of
from compress.surgery.quantization.modules import (
    FakeQuantWeight,
    Product,
    Table,
    fake_quantized,
    operands,
    prepared,
    quantizer_parameters,
    stored,
    weights_and_scales,
)
from compress.surgery.quantization.pack import left_in_float32, packed_state, restore, unpacked
from compress.surgery.quantization.spec import (
    ActivationName,
    ActivationQuantization,
    Activations,
    EmbeddingQuantization,
    MatrixSpec,
    Quantization,
    QuantizationSpec,
    Storage,
    WeightQuantization,
    packed_bytes,
)

__all__ = [
    "ActivationName",
    "ActivationQuantization",
    "Activations",
    "EmbeddingQuantization",
    "FakeQuantWeight",
    "Filter",
    "MatrixSpec",
    "Product",
    "Quantization",
    "QuantizationSpec",
    "Storage",
    "Table",
    "WeightQuantization",
    "fake_quantized",
    "histograms",
    "left_in_float32",
    "mean_cosine",
    "method_of",
    "operands",
    "packed_bytes",
    "packed_state",
    "plan",
    "prepared",
    "quantize",
    "quantizer_parameters",
    "restore",
    "stored",
    "unpacked",
    "weights_and_scales",
]
