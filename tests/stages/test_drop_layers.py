"""Dropping layers: the right ones, a stock directory, and stages before and after it that know what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from compress.artifact import MANIFEST, Artifact, adopt, save_masks
from compress.errors import ModelError, NothingDoneError
from compress.files import sha256
from compress.models.loading import build
from compress.models.structure import count_parameters, stock_tensors
from compress.onnx.runtime import Runtime
from compress.registry import STAGES
from compress.surgery.layers import drop as surgery

FAMILIES = ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"]
WHOLE = "keep: every layer would stay; allowed: fewer than"
MAGNITUDE = {"type": "learn_masks", "method": "magnitude"}


@pytest.fixture
def base(request: Any, stock: Any) -> Any:
    def make(family: str = "tiny_gpt2", **options: Any) -> Artifact:
        made: Artifact = stock(request.getfixturevalue(family)(**{"layers": 6, "hidden": 16, **options}))
        return made

    return make


def drop(keep: Any, **config: Any) -> dict[str, Any]:
    return {"type": "drop_layers", "keep": keep, **config}


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def origins(made: Artifact, root: Artifact) -> dict[str, list[int]]:
    """For each stack: the layers of the root whose tensors the layers of ``made`` hold."""
    ours, theirs = made.model().state_dict(), root.model().state_dict()
    found: dict[str, list[int]] = {}
    for stack in root.family().stacks:
        mark = {name: f"{stack.layers}.{{}}.{name}" for name in ("mlp.c_fc.weight", "fc1.weight")}
        (place,) = [text for text in mark.values() if text.format(0) in theirs]
        depths = stack.depth(made.config()), stack.depth(root.config())
        found[stack.name] = [
            next(old for old in range(depths[1]) if torch.equal(ours[place.format(new)], theirs[place.format(old)]))
            for new in range(depths[0])
        ]
    return found


# -- which layers, and how many


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "keep", "left"),
    [
        ("tiny_gpt2", 3, {"decoder": [0, 2, 5]}),
        ("tiny_gpt2", [0, 3, 4], {"decoder": [0, 3, 4]}),
        ("tiny_gpt2", {"decoder": 2}, {"decoder": [0, 5]}),
        ("tiny_bart", 5, {"encoder": [0, 1, 3, 4, 5], "decoder": [0, 1, 3, 4, 5]}),
        ("tiny_bart", {"encoder": 3, "decoder": 1}, {"encoder": [0, 2, 5], "decoder": [5]}),
        ("tiny_bart", {"encoder": [0, 1], "decoder": [4]}, {"encoder": [0, 1], "decoder": [4]}),
        ("tiny_bart", {"encoder": 6, "decoder": 1}, {"decoder": [5]}),
        ("tiny_bart", {"encoder": 1}, {"encoder": [5]}),
    ],
)
def test_the_layers_that_were_asked_for_stay(
    family: str, keep: Any, left: Any, base: Any, run_stage: Any, shape_of: Any
) -> None:
    root = base(family)
    made = run_stage(drop(keep), root)
    assert made.manifest.layers == left
    whole = {stack.name: list(range(6)) for stack in root.family().stacks}
    assert origins(made, root) == whole | left
    known = STAGES.read(drop(keep)).shape(shape_of(root))
    assert (known.sizes, known.layers, known.traits) == (made.sizes(), left, made.traits)
    configs = [config.to_dict() | {"_name_or_path": ""} for config in (known.config, made.config())]
    assert configs[0] == configs[1]
    with torch.device("meta"):
        planned = count_parameters(build(known.config), root.family().axes(known.config), known.sizes)
    assert planned == sum(tensor.numel() for tensor in stock_tensors(made.model()))
    assert STAGES.read(drop(keep)).model_dump(mode="json")["keep"] == keep


@pytest.mark.slow
def test_a_second_drop_counts_what_the_first_left(base: Any, run_stage: Any) -> None:
    root = base("tiny_bart")
    first = run_stage(drop({"encoder": [0, 2, 3, 5], "decoder": 5}), root, out="first")
    second = run_stage(drop({"encoder": 2, "decoder": [1, 2]}), first, out="second")
    assert second.manifest.layers == origins(second, root) == {"encoder": [0, 5], "decoder": [1, 3]}
    assert second.manifest.root == root.digest
    again = run_stage(drop({"encoder": [1]}), second, out="third")
    assert again.manifest.layers == {"encoder": [5], "decoder": [1, 3]}


STOCK = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
for place, kind in json.loads(sys.argv[1]):
    stock = {"gpt2": AutoModelForCausalLM, "bart": AutoModelForSeq2SeqLM}[kind]
    model, report = stock.from_pretrained(place, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        logits = model.eval()(**load_file(place + ".inputs")).logits
    save_file({"logits": logits}, place + ".logits")
assert "compress" not in sys.modules
"""


@pytest.mark.slow
def test_the_directory_opens_without_this_package(tmp_path: Path, base: Any, run_stage: Any, tiny_inputs: Any) -> None:
    places, expected = [], {}
    for number, (family, options) in enumerate(
        [("tiny_gpt2", {}), ("tiny_bart", {}), ("tiny_bart", {"scale_embedding": True})]
    ):
        keep = [0, 2, 3] if family == "tiny_gpt2" else {"encoder": 3, "decoder": 1}
        made = run_stage(drop(keep), base(family, **options), out=str(number))
        inputs = tiny_inputs(made.model())
        save_file(inputs, f"{made.path}.inputs")
        expected[str(made.path)] = logits(made.model(), inputs)
        places.append((str(made.path), made.manifest.family))
    ours = {name: os.environ[name] for name in os.environ if not name.startswith("PYTHON")}
    command = [sys.executable, "-c", STOCK, json.dumps(places)]
    done = subprocess.run(command, cwd=tmp_path, env=ours, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for place, same in expected.items():
        torch.testing.assert_close(load_file(f"{place}.logits")["logits"], same, atol=1e-6, rtol=1e-5)


def test_a_manifest_says_nothing_of_layers_where_all_are_left(base: Any, run_stage: Any) -> None:
    """So that what was made before there were maps keeps its bytes and its identity."""
    root = base()
    masked = run_stage(MAGNITUDE, root)
    for artifact in (root, masked):
        assert "layers" not in artifact.manifest.model_dump(mode="json", include={"quantization", "kept", "layers"})
    assert "layers" not in json.loads((masked.path / MANIFEST).read_text())
    short = run_stage(drop(3), root, out="short")
    assert json.loads((short.path / MANIFEST).read_text())["layers"] == {"decoder": [0, 2, 5]}


# -- beside the other stages


@pytest.fixture
def scored(base: Any, run_stage: Any) -> Any:
    """A masked artifact whose scores differ from unit to unit and from layer to layer."""

    def make(family: str, *, scores: bool = True) -> Artifact:
        masked: Artifact = run_stage(MAGNITUDE, base(family, ffn=48), out="masked")
        generator = torch.Generator().manual_seed(3)
        values = {axis: 0.2 + torch.rand(value.shape, generator=generator) for axis, value in masked.masks().items()}
        save_masks(values, masked.path, scores=scores)
        files = {name: sha256(masked.path / name) for name in masked.manifest.files}
        manifest = masked.manifest.model_copy(update={"files": files})
        (masked.path / MANIFEST).write_text(manifest.model_dump_json())
        return adopt(masked.path)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fold", [False, True])
def test_drop_and_prune_may_change_places(
    fold: bool, family: str, scored: Any, run_stage: Any, tiny_inputs: Any
) -> None:
    masked = scored(family, scores=False)
    prune = {"type": "prune", "keep": "2/4", "fold": fold}
    pruned = run_stage(prune, masked, out="pruned")
    one = run_stage(drop(3), pruned, out="one")
    dropped = run_stage(drop(3), masked, out="dropped")
    assert dropped.traits == {"masked"} and not dropped.scored
    other = run_stage(prune, dropped, out="other")
    assert one.digest == other.digest and one.traits == other.traits == {"pruned"}
    for field in ("kept", "sizes", "layers"):
        assert getattr(one.manifest, field) == getattr(other.manifest, field)
    for axis, kept in one.manifest.kept.items():
        stack = next((stack for stack in one.family().stacks if stack.layer_of(axis) is not None), None)
        if stack is not None:
            new = stack.layer_of(axis)
            assert new is not None
            kind = axis.removeprefix(f"{stack.axes}.{new}.")
            assert kept == pruned.manifest.kept[f"{stack.axes}.{one.manifest.layers[stack.name][new]}.{kind}"]


@pytest.mark.slow
@pytest.mark.parametrize("scores", [True, False])
def test_masks_come_along_with_their_layers(scores: bool, scored: Any, run_stage: Any, shape_of: Any) -> None:
    masked = scored("tiny_bart", scores=scores)
    made = run_stage(drop({"encoder": [1, 4], "decoder": [3]}), masked)
    assert made.scored == scores
    values, before = made.masks(), masked.masks()
    assert values.keys() == {axis.name for axis in made.family().axes(made.config())}
    for new, old in (
        ("encoder.layer.1.heads", "encoder.layer.4.heads"),
        ("decoder.layer.0.ffn", "decoder.layer.3.ffn"),
    ):
        assert torch.equal(values[new], before[old])
    assert torch.equal(values["hidden"], before["hidden"])
    known = shape_of(masked, masked=("hidden", "heads", "ffn"), scored=scores)
    after = STAGES.read(drop(3)).shape(known)
    assert (after.masked, after.scored, after.traits) == (known.masked, scores, known.traits)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_uneven_model_stays_one(family: str, scored: Any, run_stage: Any, tiny_inputs: Any) -> None:
    prune = {"type": "prune", "keep": {"heads": "3/4", "ffn": "1/3"}, "uniform": False}
    pruned = run_stage(prune, scored(family), out="pruned")
    made = run_stage(drop(3), pruned)
    assert not made.stock_shape()
    assert made.manifest.lineage[-1].coverage["note"].endswith("of 6; opens with compress.load only")
    model = made.model()
    assert made.sizes() == {
        axis: len(made.manifest.kept.get(axis, range(size))) for axis, size in made.manifest.sizes.items()
    }
    expected = pruned.model()
    surgery(expected, pruned.family(), made.manifest.layers)
    inputs = tiny_inputs(expected)
    assert torch.equal(logits(model, inputs), logits(expected, inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "keep", "options"),
    [
        ("tiny_gpt2", [1, 4], {}),
        ("tiny_bart", {"encoder": 3, "decoder": 1}, {}),
        ("tiny_bart", {"encoder": 1, "decoder": 3}, {"scale_embedding": True}),
    ],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_a_short_model_is_quantized_and_exported(
    bits: Any, family: str, keep: Any, options: Any, base: Any, run_stage: Any, tiny_inputs: Any
) -> None:
    made = run_stage(drop(keep), base(family, hidden=32, **options), out="short")
    if bits:
        small = {"type": "quantize", "weights": {"bits": bits}, "embedding": {"bits": bits}, "train": {"steps": 0}}
        made = run_stage(small, made, out="small")
    exported = run_stage({"type": "export_onnx"}, made, out="onnx")
    assert exported.manifest.layers == made.manifest.layers != {}
    model = made.model()
    inputs = {name: tensor for name, tensor in tiny_inputs(model).items() if name != "decoder_input_ids"}
    if bits:
        return  # the export's own gate has compared it with torch
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        text = model.generate(ids, attention_mask=mask, max_new_tokens=6, num_beams=1, do_sample=False, pad_token_id=1)
    ours = Runtime.open(exported.path).generate(ids.numpy(), attention_mask=mask.numpy(), max_new_tokens=6)
    assert ours.tolist() == text[:, -ours.shape[1] :].tolist()


# -- terms that compare layer by layer


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("term", ["causal_kv", "hidden_mse"])
def test_a_copy_is_taught_by_the_layers_it_came_from(
    term: str, family: str, base: Any, run_stage: Any, learnable: Any, shape_of: Any
) -> None:
    """The first layers see what the teacher's see, so their distance before the first step is 0; no others' is."""
    root = base(family)
    train = {"steps": 1, "batch": 4, "eval_every": 1, "dropout": 0.0, "lr": 1e-6}
    stage = {"type": "distill", "teacher": "base", "terms": [term], "train": train}
    for out, keep in (("head", [0, 1, 2]), ("tail", [3, 4, 5])):
        decoder = keep if family == "tiny_gpt2" else {"decoder": keep}
        short = run_stage(drop(decoder), root, out=out)
        assert not list(STAGES.read(stage).problems(shape_of(short, root="base"), shape_of(root)))
        made = run_stage(stage, short, data=learnable(root), models={"base": root}, out=f"{out}-{term}")
        lines = [json.loads(line) for line in (made.path / "history.jsonl").read_text().splitlines()]
        first = next(line["terms"][term] for line in lines if "terms" in line)
        assert made.manifest.layers == {"decoder": keep}
        assert first < 1e-9 if out == "head" else first > 1e-3


@pytest.mark.slow
def test_a_teacher_must_have_the_layers_of_its_student(
    base: Any, run_stage: Any, shape_of: Any, learnable: Any
) -> None:
    root = base()
    some, others = (run_stage(drop(keep), root, out=f"of-{len(keep)}") for keep in ([0, 2, 5], [0, 5]))
    shapes = {"base": shape_of(root), "some": shape_of(some, "some", root="base")}
    shapes["others"] = shape_of(others, "others", root="base")
    allowed = {("others", "some"), ("others", "base"), ("some", "base"), *((name, name) for name in shapes)}
    for term in ("causal_kv", "hidden_mse"):
        stage = {"type": "distill", "teacher": "t", "terms": [term], "train": {"steps": 1}}
        for student in shapes:
            for teacher in shapes:
                found = list(STAGES.read(stage).problems(shapes[student], shapes[teacher]))
                assert bool(found) == ((student, teacher) not in allowed), (student, teacher)
        (problem,) = STAGES.read(stage).problems(shapes["some"], shapes["others"])
        message = "compares layer by layer, and the teacher lacks layer 2 of the model that both descend from; "
        assert str(problem) == f"terms[0]: {term} {message}allowed: a teacher that has every layer of the student"
        with pytest.raises(ModelError, match=f"{term} compares layer by layer, and the teacher lacks layer 2"):
            run_stage(stage, some, data=learnable(root), models={"t": others}, out=f"bad-{term}")
    last = {
        "type": "distill",
        "teacher": "t",
        "terms": [{"type": "hidden_mse", "layers": "last"}],
        "train": {"steps": 1},
    }
    assert not list(STAGES.read(last).problems(shapes["some"], shapes["others"]))


# -- what is refused


@pytest.mark.parametrize(
    ("family", "keep", "message"),
    [
        ("tiny_gpt2", 7, "keep: 7 layers, but the decoder has 6; allowed: 1 to 6"),
        ("tiny_gpt2", [0, 6], "keep: layer 6, but the decoder has 6; allowed: 0 to 5"),
        ("tiny_gpt2", {"encoder": 3}, "keep.encoder: this model has no such layers; allowed: decoder"),
        ("tiny_gpt2", 6, f"{WHOLE} the decoder's 6"),
        ("tiny_gpt2", [0, 1, 2, 3, 4, 5], f"{WHOLE} the decoder's 6"),
        ("tiny_bart", {"encoder": 6}, f"{WHOLE} the encoder's 6 or the decoder's 6"),
        ("tiny_bart", {"encoder": 2, "decoder": 9}, "keep.decoder: 9 layers, but the decoder has 6; allowed: 1 to 6"),
        ("tiny_bart", {"encoder": [9]}, "keep.encoder: layer 9, but the encoder has 6; allowed: 0 to 5"),
        ("tiny_bart", {"layers": 2}, "keep.layers: this model has no such layers; allowed: encoder, decoder"),
    ],
)
def test_layers_that_are_not_there_are_reported_twice(
    family: str, keep: Any, message: str, base: Any, run_stage: Any, shape_of: Any
) -> None:
    """By the check, from the shape alone, and by the run."""
    source = base(family)
    assert list(map(str, STAGES.read(drop(keep)).problems(shape_of(source), None))) == [message]
    with pytest.raises((ModelError, NothingDoneError)):
        run_stage(drop(keep), source)


@pytest.mark.parametrize(
    "keep",
    [0, -2, 2.5, "2/6", {"encoder": 0}, {}, [], [2, 0], [1, 1], [-1, 2], [0, True], {"decoder": [0, "2"]}, None],
)
def test_fields_are_checked(keep: Any) -> None:
    with pytest.raises(
        ValidationError, match="write a number of layers from 1, or an ascending list of layers from 0, such as"
    ):
        STAGES.read(drop(keep))
    with pytest.raises(ValidationError, match="keep is true; give a number"):
        STAGES.read(drop(True))


@pytest.mark.slow
def test_a_deeper_stack_keeps_what_a_shallow_one_has_not(base: Any, run_stage: Any, shape_of: Any) -> None:
    """A bare number holds for every stack, and one that has just as many layers keeps them all."""
    short = run_stage(drop({"decoder": 2}), base("tiny_bart"), out="short")
    after = STAGES.read(drop(2)).shape(shape_of(short))
    assert after.layers == {"encoder": [0, 5], "decoder": [0, 5]}
    (problem,) = STAGES.read(drop(3)).problems(shape_of(short), None)
    assert str(problem) == "keep: 3 layers, but the decoder has 2; allowed: 1 to 2"
