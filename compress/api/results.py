"""Measure models, in memory or in directories: their quality, or their speed in one interleaved run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from compress.api.arguments import configured, opened, refuse_idle, renamed, require_flag
from compress.api.teaching import require_alike
from compress.artifact import Artifact
from compress.engine.models import checked, device_of, side_of, undisturbed
from compress.engine.rows import as_split, require_block_read, require_tokenizer
from compress.errors import ModelError, UserError, located
from compress.generation.subject import TorchSubject, subject_of
from compress.measure.floor import model_step_bytes
from compress.measure.metrics.imported import Imported
from compress.measure.quality import Quality, read_metric
from compress.measure.speed import Speed, compare_with_first, floor, summary
from compress.measure.table import records_table
from compress.measure.torch_stepper import TorchStepper
from compress.measure.workload import OnnxStepper, Stepper
from compress.onnx.runtime.sampling import as_tokens
from compress.onnx.step_bytes import directory_step_bytes
from compress.problem import Location
from compress.registry import METRICS
from compress.surgery.quantization import prepared


class Records(list[dict[str, Any]]):
    """The measured values, one record per model. They print as a table."""

    def __repr__(self) -> str:
        console = Console(width=160, no_color=True, force_jupyter=False)
        with console.capture() as shown:
            console.print(records_table(self))
        return shown.get().rstrip()

    def _repr_html_(self) -> str:
        # A captured console records nothing, so this one prints to a file in memory.
        console = Console(width=160, record=True, file=io.StringIO(), force_jupyter=False)
        console.print(records_table(self))
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def evaluate(
    model: nn.Module | str | Path,
    data: Any,
    *,
    metrics: str | Sequence[str | Mapping[str, Any]] = ("perplexity",),
    tokenizer: Any = None,
    reference: nn.Module | str | Path | None = None,
    block: int | None = None,
    batch: int = 8,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Measure the quality of a model, in memory or in a directory, in float32.

    Args:
        model: a model, quantized or not, or a directory (an artifact, a Hugging Face directory or an ONNX export).
        data: as in :func:`compress.finetune`; metrics of generated text need prompts and responses, or pairs.
        metrics: names, as in a recipe: built-in metrics, those of plug-ins, and metrics of the ``evaluate`` library. A
            metric of ``evaluate`` is given by name if it is in the cache of ``evaluate``, or as
            ``{"path": "my_metric.py"}``, which runs that file.
        tokenizer: the tokenizer of the model; a directory contains its own.
        reference: the model that ``agreement`` compares with.
        block: as in :func:`compress.finetune`.
        batch: rows per batch.
        progress: draw a progress bar.
        **settings: further fields of the ``quality`` measurement: ``decoding`` (how text is generated), ``sentences``
            (of ``rouge``) and ``bleu_tokenize``.

    Returns:
        A dict from metric name to value. Its key ``conditions`` describes how they were measured.

    Raises:
        UserError: an argument cannot be used, or the data does not fit the metrics.

    Examples:
        >>> found = compress.evaluate(model, test, tokenizer=tokenizer, progress=False)
        >>> 1 < found["perplexity"] < 1000
        True
    """
    named = _read_metrics(metrics)
    require_flag(progress, "progress")
    refuse_idle(settings, dict.fromkeys(("of", "split", "type"), "model and data say what is measured"))
    if "metric" in settings:
        raise UserError("metric: is called metrics here; give metrics=['perplexity']")
    comparing = any("reference" in METRICS.get(each).takes for each in named if isinstance(each, str))
    if comparing != (reference is not None):
        raise UserError("reference: belongs to a metric that compares with it, such as agreement; give both or neither")
    compared_with = None if reference is None else "reference"
    with renamed(_argument):
        quality: Quality = configured(Quality, metric=named, batch=batch, reference=compared_with, **settings)
        reads = {metric.reads for metric in quality.metrics().values()}
    if reads == {"logits"}:
        refuse_idle(settings, {"decoding": f"{', '.join(quality.called)} generates no text"})
    subject, tokenizer, config, working = _opened(model, tokenizer, "model")
    other, _, _, compared = (
        (None, None, None, None) if reference is None else _opened(reference, tokenizer, "reference")
    )
    rows = as_split(data, config, tokenizer, name="data", block=block)
    if block is not None:
        require_block_read(rows, data)
    if reference is not None and working is not None and compared is not None:
        require_alike(compared, working, "reference", rows)
    console = Console(stderr=True) if progress else None
    in_memory = [each for each in (working, compared) if each is not None]
    with renamed(_argument), undisturbed(*in_memory), ExitStack() as held:
        for each in in_memory:
            held.enter_context(prepared(each.eval()))
        record = quality.measured("evaluate", subject, tokenizer, rows, other, console)
    return {**record["quality"], "conditions": record["conditions"]["quality"]}


def benchmark(
    models: Sequence[nn.Module | str | Path] | Mapping[str, nn.Module | str | Path],
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    batch: int = 1,
    threads: int | None = None,
    rounds: int = 10,
) -> Records:
    """Compare the speed of models. In each round every model decodes once, greedily, on the CPU.

    Args:
        models: models in memory and directories, in a list or in a dict by name. A quantized model in memory emulates
            its arithmetic in float32, so its times say nothing about the deployed model: export it first.
        prompt_tokens: number of tokens of the prompt (of the source, for an encoder-decoder).
        new_tokens: number of tokens that are timed one by one after the first.
        batch: rows per batch.
        threads: number of threads of torch and onnxruntime; by default one per core.
        rounds: number of timed rounds, after one warm-up round.

    Returns:
        One record per model, in the order of ``models``; they print as a table. ``speed`` contains ``prefill_ms`` and
        ``per_token_ms`` (``p50``, ``p95``), ``tokens_per_s``, ``floor_ms`` (the time in which memory delivers the
        weights of a step), and ``faster``: how many times as fast as the first model.

    Raises:
        UserError: an argument cannot be used.

    Examples:
        >>> records = compress.benchmark([model], prompt_tokens=4, new_tokens=2, rounds=1)
        >>> records[0]["speed"]["faster"]["per_token"]
        1.0
    """
    speed: Speed = configured(
        Speed, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, threads=threads, rounds=rounds
    )
    named = _named(models)
    paths = {name: each for name, each in named.items() if isinstance(each, str | Path)}
    artifacts = {name: opened(path, f"models: {name}", deployed=True) for name, path in paths.items()}
    for name, each in named.items():
        if name not in artifacts:
            checked(each, f"models: {name}", forbids=("masked",))
            if device_of(each).type != "cpu":
                raise ModelError(
                    f"models: {name}: is on {device_of(each)}; models are timed on the CPU, so give model.cpu()"
                )
    configs = {name: artifacts[name].config() if name in artifacts else each.config for name, each in named.items()}
    for problem in speed.problems(configs, None):
        raise UserError(problem)
    work = speed.workload(min(config.vocab_size for config in configs.values()))
    held = [each for each in named.values() if isinstance(each, nn.Module)]
    with undisturbed(*held):
        steppers = {name: _stepper(each, artifacts.get(name), work.threads) for name, each in named.items()}
        times, bandwidth = speed.timed(steppers, work)
        records = Records()
        for name, stepper in steppers.items():
            found = summary(times[name], work)
            read = _step_bytes(stepper, artifacts.get(name))
            records.append({"name": name, "speed": found | floor(read, bandwidth, found["per_token_ms"]["p50"])})
    compare_with_first(records)
    return records


def _read_metrics(metrics: Any) -> list[Any]:
    given = [metrics] if isinstance(metrics, str | Mapping) else metrics
    if not isinstance(given, Sequence) or not given or isinstance(given, bytes):
        raise UserError(f"metrics: expected a list of some of {', '.join(METRICS.names())}, got {metrics!r}")
    named: list[Any] = []
    for each in given:
        metric = _script(each) if isinstance(each, Mapping) else _known(each)
        if metric in named:
            raise UserError(f"metrics: {each!r} is named twice")
        named.append(metric)
    return named


def _argument(path: Location) -> Location:
    return ("metrics", *path[1:]) if path[:1] == ("metric",) else path


def _script(given: Mapping[Any, Any]) -> Imported:
    if odd := next((key for key in given if not isinstance(key, str)), None):
        raise UserError(f"metrics: expected the fields of a script, such as path, got the key {odd!r}")
    with located("metrics"):
        script: Imported = configured(Imported, **given)
    return script


def _known(name: Any) -> Any:
    try:
        return read_metric(name)
    except ValueError as error:
        raise UserError(f"metrics: {error}") from None


def _opened(model: nn.Module | str | Path, tokenizer: Any, name: str) -> tuple[Any, Any, Any, nn.Module | None]:
    """Return the object to measure, its tokenizer, its config, and the model itself if it is in memory."""
    if isinstance(model, str | Path):
        artifact = opened(model, name)
        own = artifact.tokenizer() if tokenizer is None else tokenizer
        return subject_of(artifact, "cpu"), own, artifact.config(), None
    family = checked(model, name, forbids=("masked",))
    config: Any = model.config
    require_tokenizer(tokenizer, config)
    settings = getattr(model, "generation_config", None)
    ends = [*as_tokens(getattr(settings, "eos_token_id", None)), *as_tokens(getattr(tokenizer, "eos_token_id", None))]
    return TorchSubject(side_of(model, family), tokenizer, list(dict.fromkeys(ends))), tokenizer, config, model


def _named(models: Any) -> dict[str, Any]:
    if isinstance(models, Mapping):
        if odd := next((name for name in models if not isinstance(name, str)), None):
            raise UserError(f"models: expected names that are strings, such as 'small', got {odd!r}")
        named = dict(models)
    elif isinstance(models, str | Path | nn.Module):
        named = {_label(models, 0): models}
    elif not isinstance(models, Sequence) or isinstance(models, bytes):
        raise UserError(f"models: expected a list of models and directories, got {type(models).__name__}")
    else:
        labels = [_label(each, at) for at, each in enumerate(models)]
        named = {
            label if labels.count(label) == 1 else f"{label} {at}": each
            for at, (label, each) in enumerate(zip(labels, models, strict=True))
        }
    if not named:
        raise UserError("models: is empty; give at least one model or directory")
    return named


def _label(model: Any, at: int) -> str:
    return Path(model).name if isinstance(model, str | Path) else f"model {at}"


def _stepper(model: Any, artifact: Artifact | None, threads: int) -> Stepper:
    if artifact is not None and "onnx" in artifact.traits:
        return OnnxStepper(artifact.path, threads)
    if artifact is not None:
        return TorchStepper.of(artifact, "cpu")
    return TorchStepper(model.eval(), device_of(model))


def _step_bytes(stepper: Stepper, artifact: Artifact | None) -> int:
    if isinstance(stepper, TorchStepper):
        return model_step_bytes(stepper.model)
    assert artifact is not None
    return directory_step_bytes(artifact.path)
