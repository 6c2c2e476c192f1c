"""Products with the same input: one fused product where their matrices agree, separate products where they differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from compress.functional.packing import pack_blocks
from compress.models import family_of
from compress.models.loading import build
from compress.onnx.export.exporter import Packed, export
from compress.onnx.export.graph import FLOAT, Graph
from compress.onnx.export.matrices import FloatMatrix, Matrix, PackedMatrix
from compress.onnx.export.weights import Weights
from compress.onnx.names import DECODER_FILE, MODEL_FILE
from compress.surgery.quantization import Quantization, packed_state, plan, quantize, restore

COLUMNS = 200
QKV = "q_proj+k_proj+v_proj"
OUTPUTS = {"gate": 24, "up": 24, "query": 40}


def random_weights(forms: dict[str, tuple[int, int]]) -> tuple[Weights, dict[str, Any]]:
    """Matrices by module, each of these bits (0: float) and block, and their values in float64."""
    generator = np.random.default_rng(0)
    matrices: dict[str, Matrix] = {}
    values = {}
    for module, (bits, block) in forms.items():
        shape = OUTPUTS[module], COLUMNS
        if not bits:
            values[module] = generator.normal(size=shape)
            matrices[module] = FloatMatrix(f"{module}.weight", values[module].astype(np.float32))
            continue
        codes = generator.integers(0, 2**bits, shape).astype(np.uint8)
        scales = generator.uniform(0.5, 1.5, (shape[0], -(-COLUMNS // block))).astype(np.float32)
        packed = pack_blocks(torch.from_numpy(codes), bits, block).numpy()
        matrices[module] = PackedMatrix(module, packed, scales, bits, block, COLUMNS, float_inputs=True)
        spread = scales.astype(np.float64).repeat(block, axis=1)[:, :COLUMNS]
        values[module] = (codes.astype(np.float64) - 2 ** (bits - 1)) * spread
    return Weights(matrices, {}, {}, {}), values


@pytest.mark.parametrize(
    ("forms", "products"),
    [
        ({"gate": (0, 0), "up": (0, 0)}, 1),
        ({"gate": (0, 0), "query": (0, 0)}, 1),
        ({"gate": (4, 32), "up": (4, 32)}, 1),
        ({"gate": (4, 128), "up": (4, 128), "query": (4, 128)}, 1),
        ({"gate": (4, 32), "up": (4, 64)}, 2),
        ({"gate": (4, 64), "up": (4, 64), "query": (4, 128)}, 3),
        ({"gate": (2, 64), "up": (4, 64)}, 2),
        ({"gate": (0, 0), "up": (4, 64)}, 2),
    ],
    ids=str,
)
def test_products_of_one_input_equal_float64(forms: dict[str, tuple[int, int]], products: int) -> None:
    weights, values = random_weights(forms)
    graph = Graph("products")
    graph.input("x", FLOAT, ["rows", COLUMNS])
    for module, value in zip(forms, weights.products(graph, tuple(forms), "x"), strict=True):
        graph.node("Identity", [value], f"{module}.y")
        graph.output(f"{module}.y", FLOAT, ["rows", OUTPUTS[module]])
    model = graph.model()
    assert sum(node.op_type in ("MatMulNBits", "FusedMatMul") for node in model.graph.node) == products
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(3, COLUMNS)).astype(np.float32)
    for module, found in zip(forms, session.run(None, {"x": x}), strict=True):
        expected = x.astype(np.float64) @ values[module].T
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def packed_with_blocks(model: Any, bits: int, blocks: dict[str, int]) -> tuple[Any, Packed]:
    """The deployed form of a model whose modules with these endings have these block sizes, and others 32."""
    family = family_of(model.config)
    config = Quantization.model_validate(
        {"weights": {"bits": bits, "granularity": "group", "group_size": 32}, "embedding": {"bits": bits}}
        | {"activations": {}}
    )
    spec = plan(model, family, config)
    matrices = [
        matrix.model_copy(update={"block": block})
        for matrix in spec.matrices
        for block in [next((size for end, size in blocks.items() if matrix.module.endswith(end)), matrix.block)]
    ]
    quantize(model, family, config, spec.model_copy(update={"matrices": tuple(matrices)}))
    tensors, spec = packed_state(model)
    deployed = build(model.config)
    restore(deployed, family, spec, tensors, dequantize=False)
    return deployed.eval(), Packed(spec, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("family", "blocks", "fused"),
    [
        ("bart", {}, (QKV, "k_proj+v_proj")),
        ("bart", {"k_proj": 64}, ()),
        ("bart", {"self_attn.v_proj": 128}, ("k_proj+v_proj",)),
        ("llama", {}, (QKV, "gate_proj+up_proj")),
        ("llama", {"up_proj": 64}, (QKV,)),
        ("llama", {"k_proj": 64, "gate_proj": 128}, ()),
    ],
    ids=str,
)
def test_differing_block_sizes_are_not_fused(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    family: str,
    bits: int,
    blocks: dict[str, int],
    fused: tuple[str, ...],
) -> None:
    """Each product keeps its own block size, and the gate holds."""
    model = request.getfixturevalue(f"tiny_{family}")(layers=1, hidden=128, ffn=192)
    deployed, packed = packed_with_blocks(model, bits, blocks)
    deployed.config.save_pretrained(tmp_path)
    figures = export(deployed, tmp_path, packed=packed)
    assert figures["max_product_error"] <= 1e-5
    graph = onnx.load(next(path for name in (DECODER_FILE, MODEL_FILE) if (path := tmp_path / name).exists())).graph
    sizes = {matrix.module: matrix.block for matrix in packed.spec.matrices}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    for node in products:
        (size,) = [attribute.i for attribute in node.attribute if attribute.name == "block_size"]
        assert {sizes[module] for module in node.name.split("+")} == {size}
    joined = ["+".join(module.rpartition(".")[2] for module in node.name.split("+")) for node in products]
    assert {name for name in joined if "+" in name} == set(fused)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("family", ["gpt2", "bart", "llama", "mbart"])
def test_every_group_size_passes_the_gate(exported: Callable[..., Any], family: str, group_size: int) -> None:
    groups = {"granularity": "group", "group_size": group_size}
    found = exported(4, family=family, layers=1, hidden=80, heads=2, quantization=groups)
    assert {matrix.block for matrix in found.packed.spec.matrices if "embed" not in matrix.module} >= {group_size}
    assert found.figures["max_product_error"] <= 1e-5
