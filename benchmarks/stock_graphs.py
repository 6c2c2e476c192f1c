"""The graphs that others make of the same model: optimum's float32 export, and onnxruntime's quantizers on it."""

import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import stock_seq2seq
from contender import Contender, Skipped, finished, fresh_process
from onnx import numpy_helper
from own_models import Shape, passes, stock

from compress.measure.peak import measure_in_fresh_process
from compress.measure.workload import OnnxStepper
from compress.onnx.step_bytes import step_bytes

FLOAT, INT8, NBITS = "optimum-float", "ort-dynamic-int8", "ort-matmul-4bits"
UNTIED = "ort-dynamic-int8-untied"
"""As the quantizer makes it once a tied head has a constant of its own, which it does not see otherwise."""
STOCK_INT8 = (INT8, UNTIED, NBITS)
"""What computes on 8-bit activations; the fastest is what others offer."""


def stock_graphs(shape: Shape, root: Path, threads: int) -> Iterator[Contender]:
    """Optimum's export and the graphs that are made of it."""
    exported = root / FLOAT
    facts = {FLOAT: finished(exported, partial(export_float, stock(shape, root)))}
    for name, quantize in ((INT8, _dynamic), (UNTIED, _dynamic_untied), (NBITS, _nbits)):
        facts[name] = finished(root / name, partial(_each_graph, exported, quantize))
    for name, found in facts.items():
        yield _contender(root / name, threads, found)


def _contender(directory: Path, threads: int, facts: dict[str, Any]) -> Contender:
    alone = (directory / "model.onnx").exists()
    step = directory / ("model.onnx" if alone else stock_seq2seq.LATER)
    if alone:  # its names and its cache, which grows, are those that the runtime of this project reads
        fresh = partial(measure_in_fresh_process, directory, "onnx")
    else:
        fresh = lambda work: fresh_process("stock_seq2seq", work, directory, threads)  # noqa: E731
    opener = OnnxStepper if alone else stock_seq2seq.Stepper
    return Contender(
        name=directory.name,
        files=tuple(directory.glob("*.onnx*")),
        open=lambda: passes(opener(directory, threads)),
        fresh=fresh,
        step_bytes=lambda: step_bytes(onnx.load(step, load_external_data=False)),
        facts=facts,
    )


def export_float(source: Path, out: Path) -> dict[str, Any]:
    """Optimum's float32 export with a cache; Skipped without optimum."""
    try:
        from optimum.exporters.onnx import main_export
    except ImportError:
        raise Skipped("optimum-onnx is not installed") from None
    start = time.perf_counter()
    alone = "GPT2" in (source / "config.json").read_text()
    task = "text-generation-with-past" if alone else "text2text-generation-with-past"
    # an encoder-decoder keeps its two decoders apart, which is faster than the merged one that post-processing makes
    settings = {"task": task, "do_validation": False, "local_files_only": True, "no_post_process": not alone}
    with warnings.catch_warnings():  # about its own tracing
        warnings.simplefilter("ignore")
        main_export(str(source), out, **settings)
    return {"export_s": time.perf_counter() - start}


def _each_graph(source: Path, quantize: Callable[[Path, Path], None], out: Path) -> dict[str, Any]:
    start = time.perf_counter()
    for file in source.glob("*config.json"):
        shutil.copyfile(file, out / file.name)
    for file in sorted(source.glob("*.onnx")):
        quantize(file, out / file.name)
    return {"quantize_s": time.perf_counter() - start}


def _dynamic(source: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises pre-processing, which needs symbolic shapes and changes no time
    quantize_dynamic(source, out, weight_type=QuantType.QInt8)
    logging.root.setLevel(level)


def _dynamic_untied(source: Path, out: Path) -> None:
    graph = onnx.load(source)
    _fold_transposed(graph.graph)
    with TemporaryDirectory() as temporary:
        onnx.save(graph, Path(temporary) / "untied.onnx")
        _dynamic(Path(temporary) / "untied.onnx", out)


def _fold_transposed(graph: onnx.GraphProto) -> None:
    """Store each transposed weight as a constant, in place."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    for node in turned:
        values = numpy_helper.to_array(weights[node.input[0]]).T
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), node.output[0]))
        graph.node.remove(node)


def _nbits(source: Path, out: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))
