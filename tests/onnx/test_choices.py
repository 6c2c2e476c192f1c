"""What an export lets one choose: products with float32 inputs, and an embedding apart from the head's codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from compress.errors import ParityError
from compress.functional.fake_quant import dequantize
from compress.functional.packing import pack_blocks, storage_bits, to_unsigned
from compress.onnx.export.graph import FLOAT, Graph
from compress.onnx.export.matrices import unpacked
from compress.onnx.export.parity import products
from compress.onnx.export.parity.check import check_parity, float_activations
from compress.onnx.names import DECODER_FILE, SHARED_FILE
from compress.onnx.runtime import Runtime
from compress.surgery.quantization import Product

from .test_parity import MODULE, dropped_bias, node, set_attribute
from .test_seq2seq_graphs import optimized


@pytest.fixture(autouse=True)
def _own_chance() -> Iterator[None]:
    """The models drawn here leave those of later tests as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [64, 45])
def test_unpacked_is_dequantized_to_the_last_bit(bits: int, columns: int) -> None:
    chance = torch.Generator().manual_seed(0)
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (7, columns), generator=chance, dtype=torch.int8)
    scale = torch.rand(7, generator=chance)
    packed = pack_blocks(to_unsigned(codes, bits), storage_bits(bits), 32).numpy()
    graph = Graph("unpacking")
    scales = graph.weight("scales", scale[:, None].expand(packed.shape[:2]).numpy())
    values = unpacked(
        graph, graph.weight("codes", packed), scales, shape=packed.shape, bits=storage_bits(bits), columns=columns
    )
    graph.output(values, FLOAT, [7, columns])
    session = ort.InferenceSession(graph.model().SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {})[0], dequantize(codes, scale, dim=0).numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("hidden", [32, 36, 128])
def test_products_with_float_inputs(
    exported: Callable[..., Any], bits: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, a product is off by 1e-6, or by no more than twice what torch's own float32 product is."""
    reference, own = products._reference, [0.0]

    def noted(product: Product, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        exact = reference(product, x)
        with torch.no_grad():
            own.append(float(np.abs(product(torch.from_numpy(x)).numpy() - exact).max() / np.abs(exact).max()))
        return exact

    monkeypatch.setattr(products, "_reference", noted)
    found = exported(bits, hidden=hidden, layers=1, quantization={"float_inputs": True})
    assert found.figures["products"] == len(own) - 1 == 5
    assert max(own) < 1e-6
    assert found.figures["max_product_error"] <= max(1e-6, 2 * max(own))
    assert found.figures["max_logit_error"] <= found.figures["limit"] == 1e-4 * found.figures["logit_range"]
    assert "float_limit" not in found.figures


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_step_unpacks_codes(exported: Callable[..., Any], bits: int) -> None:
    """Codes with a kernel are read as they are; others are a float weight once the session is open."""
    found = exported(bits, hidden=64, quantization={"float_inputs": True})
    counts = optimized(found.directory / "model.onnx")
    products = 2 * 4 + 1
    assert counts["MatMulNBits"] == (products if bits == 4 else 0)
    assert counts["FusedMatMul"] + counts["MatMul"] == (0 if bits == 4 else products)
    assert not {"BitShift", "BitwiseAnd", "Cast", "Mul"} & set(counts - Counter(Cast=1))
    assert [tensor.name for tensor in found.graph.graph.initializer].count("transformer.wte.codes") == 1


@pytest.mark.slow
def test_float_inputs_take_the_bytes_of_codes(exported: Callable[..., Any], tmp_path: Path) -> None:
    sizes = []
    for float_inputs in (False, True):
        found = exported(2, hidden=128, quantization={"float_inputs": float_inputs})
        sizes.append((found.directory / "model.onnx").stat().st_size)
        found.directory.rename(tmp_path / f"kept-{float_inputs}")
    assert abs(sizes[0] - sizes[1]) < 12_000


def quantizing_inputs(graph: onnx.ModelProto) -> None:
    set_attribute(node(graph, MODULE), "accuracy_level", 4)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [quantizing_inputs, dropped_bias])
def test_a_wrong_product_with_float_inputs_fails(
    exported: Callable[..., Any], mutate: Callable[[onnx.ModelProto], None]
) -> None:
    found = exported(4, hidden=64, quantization={"float_inputs": True})
    graph = found.graph
    mutate(graph)
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match=rf"{MODULE} differs relatively from torch"):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "by"), [("scalar_2.0", 1.0), ("mask_2", 1), ("shifts_2", 2)])
def test_wrong_unpacking_fails(exported: Callable[..., Any], name: str, by: Any) -> None:
    """Another zero, another mask, bits that start elsewhere."""
    found = exported(2, hidden=64, quantization={"float_inputs": True})
    graph = found.graph
    (tensor,) = [each for each in graph.graph.initializer if each.name == name]
    moved = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array((moved - moved.dtype.type(by)).astype(moved.dtype), name))
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match="differs relatively from torch"):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_a_reference_with_other_inputs_fails(exported: Callable[..., Any], bits: int) -> None:
    """Torch with 8-bit inputs is no reference of a weight-only graph, nor torch with float ones of the other."""
    found = exported(bits, hidden=64, quantization={"float_inputs": True})
    for module in found.model.modules():
        if isinstance(module, Product):
            module.spec = module.spec.model_copy(update={"activations": "block"})
    with pytest.raises(ParityError, match="differs relatively"):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
def test_a_float_reference_of_quantized_inputs_fails(exported: Callable[..., Any]) -> None:
    found = exported(4, hidden=64)
    with float_activations(found.model), pytest.raises(ParityError, match="differs relatively"):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "hidden"), [(2, 36), (4, 64), (8, 32)])
def test_a_split_head_computes_the_same(
    exported: Callable[..., Any], tiny_gpt2: Callable[..., Any], tmp_path: Path, bits: int, hidden: int
) -> None:
    """To the last bit, for as many bytes more as float32 rows take; the embedding's own codes are gone from it."""
    model = tiny_gpt2(hidden=hidden)
    logits, sizes = [], []
    ids = np.arange(12).reshape(2, 6)
    for split in (False, True):
        found = exported(bits, model=deepcopy(model), split=split)
        logits.append(Runtime.open(found.directory).logits(ids))
        sizes.append((found.directory / "model.onnx").stat().st_size)
        operators = Counter(each.op_type for each in found.graph.graph.node)
        assert operators["GatherBlockQuantized"] == (not split)
        found.directory.rename(tmp_path / f"kept-{split}")
    assert np.array_equal(*logits)
    rows = 4 * 67 * hidden
    assert rows - 1500 < sizes[1] - sizes[0] <= rows + 1500


@pytest.mark.slow
def test_a_split_embedding_with_a_wrong_row_fails(exported: Callable[..., Any]) -> None:
    found = exported(4, split=True)
    graph = found.graph
    (tensor,) = [each for each in graph.graph.initializer if each.name == "transformer.wte.rows"]
    rows = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.roll(rows, 1, axis=0), tensor.name))
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match="logits with float inputs of linear layers differ"):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_both_choices_for_an_encoder_and_its_decoder(
    exported: Callable[..., Any], tiny_bart: Callable[..., Any], bits: int
) -> None:
    """Both stacks read one table of rows, stored once; attention's products are joined as ever."""
    found = exported(bits, model=tiny_bart(vocab=500), quantization={"float_inputs": True}, split=True)
    assert found.figures["max_logit_error"] <= found.figures["limit"] == 1e-4 * found.figures["logit_range"]
    decoder = onnx.load(found.directory / DECODER_FILE, load_external_data=False).graph
    (rows,) = [tensor for tensor in decoder.initializer if tensor.name.endswith(".rows")]
    assert {entry.key: entry.value for entry in rows.external_data}["location"] == SHARED_FILE
    assert "GatherBlockQuantized" not in {each.op_type for each in decoder.node}
