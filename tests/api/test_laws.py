"""Laws of the Python API: it computes what the stages compute, and changes only what it says it changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import compress
from compress.artifact import adopt
from compress.engine.models import ANCESTRY, side_of
from compress.engine.rows import as_split
from compress.errors import CompressError, DataError, ModelError, NothingDoneError, UserError
from compress.models import family_of
from compress.surgery.masks import attach
from compress.training.forward import nll
from tests.api.unchanged import assert_same, state

ROWS = [{"input_ids": [3 + (5 * i + j) % 60 for j in range(10)]} for i in range(32)]
PAIRS = [row | {"labels": row["input_ids"]} for row in ROWS]
QUIET: dict[str, Any] = {"progress": False, "batch": 4}


@pytest.fixture
def anything(tiny_model: Any) -> Any:
    return tiny_model


def rows_for(model: Any) -> list[dict[str, list[int]]]:
    return PAIRS if model.config.is_encoder_decoder else ROWS


READERS: dict[str, Callable[[Any, Path], Any]] = {
    "learn_masks": lambda model, out: compress.learn_masks(model, rows_for(model), steps=2, **QUIET),
    "magnitude": lambda model, out: compress.score(model),
    "loss_aware": lambda model, out: compress.score(model, rows_for(model), method="loss_aware", steps=2, **QUIET),
    "movement": lambda model, out: compress.score(
        model, rows_for(model), method="movement", weights_lr=1e-3, steps=2, **QUIET
    ),
    "prune": lambda model, out: compress.prune(model, compress.score(model), keep="2/4"),
    "drop_layers": lambda model, out: compress.drop_layers(model, 1),
    "teach": lambda model, out: compress.distill(
        copy.deepcopy(model), teacher=model, data=rows_for(model), terms=["forward_kl"], steps=1, **QUIET
    ),
    "save": lambda model, out: compress.save(model, out / "saved"),
    "export_onnx": lambda model, out: compress.export_onnx(model, out / "onnx"),
    "evaluate": lambda model, out: compress.evaluate(model, rows_for(model), progress=False),
    "benchmark": lambda model, out: compress.benchmark([model], prompt_tokens=4, new_tokens=2, rounds=1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_what_only_reads_a_model_changes_nothing(name: str, training: bool, anything: Any, tmp_path: Path) -> None:
    model = anything.train(training)
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    READERS[name](model, tmp_path)
    assert_same(before, state(model))


@pytest.mark.parametrize("training", [True, False])
def test_training_changes_the_weights_alone(training: bool, anything: Any) -> None:
    model = anything.train(training)
    before = state(model)
    compress.finetune(model, rows_for(model), steps=2, lr=1e-2, **QUIET)
    after = state(model)
    assert_same(before, after, weights=False)
    assert any(not torch.equal(before["tensors"][key], after["tensors"][key]) for key in before["tensors"])


def test_a_frozen_parameter_stays(tiny_gpt2: Any) -> None:
    model = tiny_gpt2()
    frozen = model.transformer.wpe.weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    compress.finetune(model, ROWS, steps=2, lr=1e-2, **QUIET)
    assert torch.equal(frozen, before) and not frozen.requires_grad


@pytest.fixture
def data_of(learnable: Any) -> Any:
    return learnable


def test_a_model_is_scored_against_itself(tiny_model: Any) -> None:
    terms = ["forward_kl", "cross_entropy"]
    given = {"method": "loss_aware", "terms": terms, "steps": 2, **QUIET}
    itself = compress.score(tiny_model, rows_for(tiny_model), teacher=tiny_model, **given)
    copied = compress.score(tiny_model, rows_for(tiny_model), teacher=copy.deepcopy(tiny_model), **given)
    assert all(torch.equal(value, copied.values[axis]) for axis, value in itself.values.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["learned", "magnitude", "loss_aware"])
def test_masks_are_those_of_the_stage(
    method: str, tmp_path: Path, anything: Any, stock: Any, learnable: Any, run_stage: Any
) -> None:
    artifact = stock(anything)
    data = learnable(artifact)
    train = {"steps": 3, "batch": 4, "precision": "fp32"}
    config: dict[str, Any] = {"type": "learn_masks", "method": method}
    config |= {} if method == "magnitude" else {"train": train}
    config |= {"teacher": "base"} if method == "learned" else {}
    stage = run_stage(config, artifact, data=data)
    model = artifact.model()
    if method == "learned":
        masks = compress.learn_masks(model, data.train, progress=False, **train)
    else:
        arguments = () if method == "magnitude" else (data.train,)
        masks = compress.score(model, *arguments, method=method, progress=False, **({} if not arguments else train))
    assert masks.scored == stage.scored
    assert all(torch.equal(masks.values[axis], value) for axis, value in stage.masks().items())
    small = compress.prune(model, masks, keep="2/4")
    cut = run_stage({"type": "prune", "keep": "2/4"}, stage, out="cut")
    assert {name: tensor.shape for name, tensor in small.state_dict().items()} == {
        name: tensor.shape for name, tensor in cut.model().state_dict().items()
    }
    assert all(torch.equal(one, other) for one, other in zip(small.parameters(), cut.model().parameters(), strict=True))
    compress.save(small, tmp_path / "small")
    assert adopt(tmp_path / "small").digest == cut.digest


@pytest.mark.slow
def test_quantized_training_is_that_of_the_stage(
    tmp_path: Path, anything: Any, stock: Any, learnable: Any, run_stage: Any
) -> None:
    artifact = stock(anything)
    data = learnable(artifact)
    train = {"steps": 3, "batch": 4, "precision": "fp32", "keep": "last"}
    stage = run_stage(
        {"type": "quantize", "teacher": "base", "weights": {"bits": 2}, "embedding": {"bits": 2}, "train": train},
        artifact,
        data=data,
    )
    model = artifact.model()
    compress.quantize_(model, weights=2)
    terms = ["forward_kl", {"type": "token_contrastive", "weight": 0.1}]
    compress.distill(model, teacher=artifact.model(), data=data.train, terms=terms, progress=False, **train)
    compress.save(model, tmp_path / "small")
    small = adopt(tmp_path / "small")
    assert small.digest == stage.digest
    exported = run_stage({"type": "export_onnx"}, stage, out="onnx")
    figures = compress.export_onnx(model, tmp_path / "mine")
    assert figures["max_logit_error"] <= figures["limit"]
    assert adopt(tmp_path / "mine").digest == exported.digest


@pytest.mark.parametrize("uniform", [True, False])
def test_a_cut_model_comes_back_as_it_was_saved(tmp_path: Path, uniform: bool, anything: Any, tiny_inputs: Any) -> None:
    keep = "2/4" if uniform else {"heads": "1/4", "ffn": "3/8"}
    small = compress.prune(anything, compress.score(anything), keep=keep, uniform=uniform)
    small = compress.drop_layers(small, 1)
    again = compress.load(compress.save(small, tmp_path / "small"))
    inputs = tiny_inputs(small)
    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, again(**inputs).logits)


@pytest.mark.slow
def test_a_quantized_cut_model_comes_back_and_exports(tmp_path: Path, anything: Any, tiny_inputs: Any) -> None:
    small = compress.prune(anything, compress.score(anything), keep={"heads": "1/4", "ffn": "3/8"}, uniform=False)
    compress.quantize_(small, weights=4, group_size=32)
    again = compress.load(compress.save(small, tmp_path / "small"))
    inputs = tiny_inputs(small)
    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, again(**inputs).logits)
    compress.export_onnx(small, tmp_path / "onnx")
    quality = [compress.evaluate(each, rows_for(small), progress=False) for each in (small, tmp_path / "onnx")]
    assert quality[0]["perplexity"] == pytest.approx(quality[1]["perplexity"], rel=1e-4)


def test_terms_that_compare_units_follow_two_cuts(anything: Any) -> None:
    once = compress.prune(anything, compress.score(anything), keep={"heads": "2/4"})
    twice = compress.drop_layers(compress.prune(once, compress.score(once), keep={"hidden": "2/4"}), 1)
    kept = getattr(twice, ANCESTRY).kept
    assert len(kept["hidden"]) == 16 and len(next(units for axis, units in kept.items() if "heads" in axis)) == 2
    done = compress.distill(
        twice, teacher=anything, data=rows_for(twice), terms=["causal_kv", "hidden_mse"], steps=1, **QUIET
    )
    assert set(done.history[0]["terms"]) == {"causal_kv", "hidden_mse"}
    with pytest.raises(UserError, match=r"terms\[0\]: causal_kv compares unit by unit"):
        compress.distill(twice, teacher=once, data=rows_for(twice), terms=["causal_kv"], steps=1, **QUIET)


@pytest.mark.slow
def test_the_filter_chooses_modules(tmp_path: Path, anything: Any) -> None:
    names = {name for name, _ in anything.named_modules()}
    ffn = ("c_fc", "mlp.c_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")
    compress.quantize_(anything, weights=2, filter=lambda name, module: name.endswith(ffn))
    swapped = {name for name, module in anything.named_modules() if type(module).__name__ == "Product"}
    assert swapped == {name for name in names if name.endswith(ffn)}
    assert compress.export_onnx(anything, tmp_path / "onnx")["products"] == len(swapped)


def test_activations_take_the_settings_of_a_recipe(tiny_model: Any) -> None:
    compress.quantize_(tiny_model, activations={"granularity": "tensor", "symmetric": False})
    found = {module.spec.activations for module in tiny_model.modules() if type(module).__name__ == "Product"}
    assert found == {"asymmetric"}


@pytest.mark.slow
def test_one_part_of_a_fused_product_may_stay_float(tmp_path: Path, tiny_bart: Any) -> None:
    model = tiny_bart()
    compress.quantize_(model, weights=8, filter=lambda name, module: name.endswith("q_proj"))
    figures = compress.export_onnx(model, tmp_path / "onnx")
    assert figures["products"] == 6


@pytest.mark.slow
def test_a_tied_embedding_that_stays_float_is_saved_once(tmp_path: Path, tiny_model: Any, tiny_inputs: Any) -> None:
    ffn = ("c_fc", "mlp.c_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")
    compress.quantize_(tiny_model, weights=8, filter=lambda name, module: name.endswith(ffn))
    again = compress.load(compress.save(tiny_model, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(tiny_model(**tiny_inputs(tiny_model)).logits, again(**tiny_inputs(tiny_model)).logits)
    names = load_file(tmp_path / "saved" / "quantized.safetensors")
    assert len({name for name in names if "embed_tokens" in name or "shared" in name or "wte" in name}) == 1
    figures = compress.export_onnx(tiny_model, tmp_path / "onnx")
    assert figures["max_logit_error"] <= figures["limit"]


@pytest.mark.slow
def test_a_reloaded_cut_remembers_its_root(tmp_path: Path, tiny_model: Any) -> None:
    small = compress.prune(tiny_model, compress.score(tiny_model), keep="2/4")
    again = compress.load(compress.save(small, tmp_path / "small"))
    one, other = (
        compress.distill(each, teacher=tiny_model, data=rows_for(small), terms=["causal_kv"], steps=1, **QUIET)
        for each in (small, again)
    )
    assert one.history[0]["loss"] == other.history[0]["loss"]


def test_a_teacher_must_read_the_same_rows(tiny_gpt2: Any, tiny_bart: Any) -> None:
    model = tiny_gpt2()
    with pytest.raises(ModelError, match="teacher: is a seq2seq model"):
        compress.distill(model, teacher=tiny_bart(), data=ROWS, steps=1, **QUIET)
    with pytest.raises(ModelError, match="teacher: accepts at most 4 tokens, but rows have up to 9"):
        compress.distill(model, teacher=tiny_gpt2(positions=4), data=ROWS, steps=1, **QUIET)
    with pytest.raises(ModelError, match="reference: is a seq2seq model"):
        compress.evaluate(model, ROWS, metrics=["agreement"], reference=tiny_bart(), progress=False)


def test_training_works_where_gradients_are_off(tiny_gpt2: Any) -> None:
    with torch.no_grad():
        assert compress.finetune(tiny_gpt2(), ROWS, steps=1, **QUIET).steps == 1


def test_the_best_step_is_kept_in_memory(tiny_gpt2: Any) -> None:
    model = tiny_gpt2()
    rows = as_split(ROWS, model.config)
    settings: dict[str, Any] = {"lr": 0.3, "eval_every": 1, "precision": "fp32", "schedule": "constant"}
    done = compress.finetune(model, rows, eval_data=rows, steps=3, **settings, **QUIET)
    losses = {row["step"]: row["eval_nll"] for row in done.history if "eval_nll" in row}
    assert done.best_step == min(losses, key=lambda step: losses[step]) != 3
    total, count = 0.0, 0
    for batch in rows.loader(4):
        value, scored = nll(side_of(model, family_of(model.config)), batch)
        total, count = total + value, count + scored
    assert total / count == pytest.approx(done.best_nll, rel=1e-5)


@pytest.mark.parametrize("kind", ["dicts", "dataset", "loader", "tensors"])
def test_every_kind_of_rows_reads_alike(kind: str, anything: Any) -> None:
    rows = rows_for(anything)
    expected = as_split(rows, anything.config)
    data: Any = {"dicts": rows, "dataset": Dataset.from_list(rows), "tensors": rows}.get(kind)
    if kind == "tensors":
        data = [{name: torch.tensor(ids) for name, ids in row.items()} for row in rows]
    if kind == "loader":
        data = DataLoader(rows, batch_size=4, collate_fn=lambda batch: _padded(batch, 13))  # type: ignore[arg-type]
    found = as_split(data, anything.config)
    for column in ("input_ids", "labels"):
        assert found.rows[column] == expected.rows[column]


def _padded(batch: list[dict[str, list[int]]], width: int) -> dict[str, torch.Tensor]:
    """Batches as a data collator of transformers makes them: padded, -100 in labels."""
    ids = [row["input_ids"] for row in batch]
    found = {
        "input_ids": torch.tensor([[*row, *[0] * (width - len(row))] for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        "labels": torch.tensor([[*row, *[-100] * (width - len(row))] for row in ids]),
    }
    return found


def test_texts_and_prompts_read_as_a_recipe_reads_them(model: Any, tokenizer: Any, texts: list[str]) -> None:
    stream = as_split(texts, model.config, tokenizer, block=8)
    assert stream.text == "\n".join(texts) and stream.longest == 8
    columns = [{"prompt": "the dog sees", "response": " 1 birds"}] * 2
    pairs = [("the dog sees", " 1 birds")] * 2
    one, other = (as_split(data, model.config, tokenizer) for data in (columns, pairs))
    assert one.rows["labels"] == other.rows["labels"] and one.rows["labels"][0][0] == -100


BAD: dict[str, tuple[Callable[[Any, Any], Any], type[CompressError], str]] = {
    "no model": (
        lambda m, t: compress.score("gpt2"),
        ModelError,
        "model: expected a transformers model such as GPT2LMHeadModel, got str",
    ),
    "a body": (lambda m, t: compress.score(m.transformer), ModelError, "model: GPT2Model has no language-model head"),
    "another family": (lambda m, t: compress.score(_of_type(m, "t5")), ModelError, "model: model_type 't5' is not"),
    "half": (
        lambda m, t: compress.score(copy.deepcopy(m).half()),
        ModelError,
        "model: has parameters of torch.float16",
    ),
    "masked": (lambda m, t: compress.quantize_(_masked(m)), ModelError, "model: is masked already"),
    "quantized": (
        lambda m, t: compress.prune(_quantized(m), compress.score(m), keep="2/4"),
        ModelError,
        "model: is quantized already",
    ),
    "no match": (lambda m, t: compress.quantize_(m, filter=lambda *_: False), NothingDoneError, "filter: matches no"),
    "half of a tie": (
        lambda m, t: compress.quantize_(m, filter=lambda name, _: name == "lm_head"),
        ModelError,
        "filter: includes lm_head but not transformer.wte",
    ),
    "bits": (lambda m, t: compress.quantize_(m, weights=5), UserError, r"weights: .*2, 3, 4 or 8.*given: 5"),
    "group size": (lambda m, t: compress.quantize_(m, group_size=48), UserError, "group_size: .*given: 48"),
    "two granularities": (
        lambda m, t: compress.quantize_(m, group_size=32, granularity="row"),
        UserError,
        "group_size needs granularity: group",
    ),
    "activation bits": (
        lambda m, t: compress.quantize_(m, activations=4),  # type: ignore[arg-type]
        UserError,
        r"activations.bits: .*8.*given: 4",
    ),
    "activation settings": (
        lambda m, t: compress.quantize_(m, activations={"scheme": "paper"}),
        UserError,
        "activations: scheme: paper is now called granularity: tensor",
    ),
    "method": (lambda m, t: compress.quantize_(m, method="magic"), UserError, "method: .*magic"),
    "no rows": (lambda m, t: compress.finetune(m, [], steps=1), DataError, "data: has no rows"),
    "a path": (lambda m, t: compress.finetune(m, "a.txt", steps=1), DataError, "data: str is not supported"),
    "columns": (lambda m, t: compress.finetune(m, [{"x": 1}], steps=1), DataError, "data: has the columns x; allowed"),
    "no tokenizer": (lambda m, t: compress.finetune(m, ["a b"], steps=1), DataError, "tokenizer: is missing"),
    "other vocabulary": (
        lambda m, t: compress.finetune(m, ["a b"], tokenizer=t, steps=1),
        ModelError,
        "tokenizer: produces token ids up to 279, but the model's vocabulary has 67",
    ),
    "no steps": (lambda m, t: compress.finetune(m, ROWS), UserError, "give either steps or epochs"),
    "zero steps": (lambda m, t: compress.finetune(m, ROWS, steps=0), UserError, "steps: is 0"),
    "an unknown setting": (lambda m, t: compress.finetune(m, ROWS, stepz=1), UserError, "unknown key 'stepz'.*'steps'"),
    "an unknown term": (
        lambda m, t: compress.distill(m, teacher=copy.deepcopy(m), data=ROWS, terms=["adaptive"], steps=1),
        UserError,
        r"terms\[0\]: unknown term 'adaptive'. Did you mean 'adaptive_kl'",
    ),
    "a term without teacher": (
        lambda m, t: compress.finetune(m, ROWS, terms=["forward_kl"], steps=1),
        UserError,
        r"terms\[0\]: forward_kl needs a teacher",
    ),
    "its own teacher": (
        lambda m, t: compress.distill(m, teacher=m, data=ROWS, steps=1),
        ModelError,
        "teacher: is the student itself",
    ),
    "a unit that is not there": (
        lambda m, t: compress.prune(m, compress.Masks({"hidden": torch.ones(5)}, True), keep="2/4"),
        ModelError,
        "masks: there are 5 values for 'hidden', but the model has 32",
    ),
    "no fraction": (lambda m, t: compress.prune(m, compress.score(m), keep="half"), UserError, "keep.*exact fraction"),
    "an uneven fraction": (lambda m, t: compress.prune(m, compress.score(m), keep="2/3"), ModelError, "allowed: 1/4"),
    "no cut": (lambda m, t: compress.prune(m, compress.score(m), keep="4/4"), NothingDoneError, "keeps every unit"),
    "all layers": (lambda m, t: compress.drop_layers(m, 2), NothingDoneError, "keeps every layer"),
    "a layer beyond": (lambda m, t: compress.drop_layers(m, [0, 7]), ModelError, "below 2"),
    "axes": (lambda m, t: compress.score(m, axes=["depth"]), UserError, "axes: 'depth' is unknown"),
    "metric": (lambda m, t: compress.evaluate(m, ROWS, metrics=["bleurt"]), UserError, "unknown metric 'bleurt'"),
    "compiled": (lambda m, t: compress.quantize_(_compiled(m)), ModelError, "model: is compiled by"),
    "a filter by name": (
        lambda m, t: compress.quantize_(m, filter="mlp"),
        UserError,
        "filter: expected a function such as lambda name, module: True, got str",
    ),
    "a block of one": (
        lambda m, t: compress.finetune(m, ROWS, steps=1, block=1),
        DataError,
        "block: expected a whole number from 2, or None, got 1",
    ),
    "no rate": (lambda m, t: compress.finetune(m, ROWS, steps=1, lr=0), UserError, "lr: is 0"),
    "no rate of masks": (lambda m, t: compress.learn_masks(m, ROWS, steps=1, mask_lr=0), UserError, "mask_lr: is 0"),
    "half a layer": (
        lambda m, t: compress.drop_layers(m, 1.5),
        UserError,
        "keep: expected a number of layers or a list such as .*, got 1.5",
    ),
    "true layers": (
        lambda m, t: compress.drop_layers(m, True),
        UserError,
        "keep: expected a number of layers or a list such as .*, got True",
    ),
    "masks without order": (
        lambda m, t: compress.prune(m, compress.Masks({"hidden": torch.full((32,), torch.nan)}, True), keep="2/4"),
        ModelError,
        "masks: a value for 'hidden' is not finite",
    ),
    "a masked model to time": (lambda m, t: compress.benchmark([_masked(m)]), ModelError, "is masked already"),
    "no model to time": (lambda m, t: compress.benchmark([]), UserError, "models: is empty"),
    "too long": (lambda m, t: compress.benchmark([m], prompt_tokens=90), UserError, "exceed the 64 positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case: str, tiny_gpt2: Any, tokenizer: Any) -> None:
    call, kind, text = BAD[case]
    model = tiny_gpt2()
    before = state(model)
    with pytest.raises(kind, match=text):
        call(model, tokenizer)
    assert_same(before, state(model))


def _of_type(model: Any, name: str) -> Any:
    other = copy.deepcopy(model)
    type(other.config).model_type, usual = name, type(other.config).model_type
    other.config = copy.copy(other.config)
    other.config.__dict__["model_type"] = name
    type(other.config).model_type = usual
    return other


def _compiled(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about parts of itself
        return torch.compile(copy.deepcopy(model))


def _masked(model: Any) -> Any:
    other = copy.deepcopy(model)
    attach(other, family_of(other.config), ["heads"])
    return other


def _quantized(model: Any) -> Any:
    other = copy.deepcopy(model)
    compress.quantize_(other, weights=8)
    return other


def test_a_directory_in_the_way_is_left_alone(tmp_path: Path, tiny_gpt2: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for function in (compress.save, compress.export_onnx):
        with pytest.raises(UserError, match="exists already; give a new directory"):
            function(tiny_gpt2(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("out", ["new/../..", "new/..", "..", "."])
def test_a_path_through_a_new_directory_removes_nothing(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gpt2: Any
) -> None:
    here = tmp_path / "outer" / "here"
    here.mkdir(parents=True)
    (tmp_path / "outer" / "mine.txt").write_text("mine")
    (here / "mine.txt").write_text("mine")
    monkeypatch.chdir(here)
    for function in (compress.save, compress.export_onnx):
        with pytest.raises(UserError, match="out: "):
            function(tiny_gpt2(), out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "mine.txt", "mine.txt", "outer"]


@pytest.mark.slow
def test_records_print_as_a_table(tmp_path: Path, tiny_gpt2: Any) -> None:
    model = tiny_gpt2()
    compress.export_onnx(model, tmp_path / "graph")
    records = compress.benchmark({"torch": model, "onnx": tmp_path / "graph"}, prompt_tokens=4, new_tokens=2, rounds=1)
    lines = repr(records).splitlines()
    assert lines[0].split()[:3] == ["name", "per", "token"] and lines[1].split()[:2] == ["ms,", "p50"]
    assert lines[3].startswith("torch") and lines[4].startswith("onnx")
    assert "<pre" in records._repr_html_()


def test_masks_are_saved_as_a_stage_saves_them(tmp_path: Path, tiny_gpt2: Any) -> None:
    masks = compress.score(tiny_gpt2())
    masks.save(tmp_path / "masks.safetensors")
    again = compress.Masks.load(tmp_path / "masks.safetensors")
    assert again.scored and all(torch.equal(again.values[axis], value) for axis, value in masks.values.items())
