"""Artifacts: whole or absent, hashed for what they compute, and stock directories to everyone else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compress
from compress.artifact import MANIFEST, Artifact, Step, adopt, save_masks, save_model, seal, stock_state
from compress.errors import ModelError
from compress.models.families.gpt2 import GPT2
from compress.models.scratch import train_bpe
from compress.models.stock_files import copy_settings
from compress.surgery.cut import cut
from compress.surgery.masks import attach, masks_of

FAMILIES = ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"]


def step(**facts: Any) -> Step:
    fields = {"stage": "s", "type": "shift", "version": 1, "config": {}, "seed": 0, "inputs": {}, "packages": {}}
    return Step.model_validate({**fields, "seconds": 0.0, **facts})


def sealed(base: Artifact, model: Any, final: Path, *, kept: Any = (), traits: Any = (), **facts: Any) -> Artifact:
    partial = final.parent / f".partial-{final.name}"
    save_model(model, base, partial)
    return seal(partial, final, parent=base, traits=traits, step=step(**facts), kept=dict(kept))


@pytest.fixture
def base(tmp_path: Path, tiny_gpt2: Any) -> Artifact:
    tiny_gpt2(layers=1).save_pretrained(tmp_path / "base")
    return adopt(tmp_path / "base")


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


# -- opening


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_directory_becomes_its_own_root(family: str, request: Any, tmp_path: Path, tiny_inputs: Any) -> None:
    model = request.getfixturevalue(family)(layers=1)
    model.save_pretrained(tmp_path / "base")
    base = adopt(tmp_path / "base")
    assert base.manifest.root == base.digest and base.traits == set()
    assert base.manifest.kept == {} and base.manifest.lineage == ()
    assert base.sizes() == {axis.name: axis.size for axis in base.family().axes(model.config)}
    assert base.tokenizer() is None
    inputs = tiny_inputs(model)
    assert torch.equal(logits(base.model(), inputs), logits(model, inputs))


def test_a_sealed_artifact_opens_as_it_was_sealed(tmp_path: Path, base: Artifact) -> None:
    made = sealed(base, base.model(), tmp_path / "made", metrics={"eval_nll": 1.5}, traits=["pruned"])
    opened = adopt(tmp_path / "made")
    assert opened == made
    assert opened.manifest.root == base.digest and opened.manifest.lineage[-1].metrics == {"eval_nll": 1.5}
    again = sealed(opened, opened.model(), tmp_path / "again")
    assert again.manifest.root == base.digest and len(again.manifest.lineage) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_changed_after_sealing_is_named(name: str, tmp_path: Path, base: Artifact) -> None:
    path = sealed(base, base.model(), tmp_path / "made").path
    content = bytearray((path / name).read_bytes())
    content[-3] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} has changed since the artifact was saved"):
        adopt(path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_gone_is_named(name: str, tmp_path: Path, base: Artifact) -> None:
    path = sealed(base, base.model(), tmp_path / "made").path
    (path / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing; the artifact is incomplete"):
        compress.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"artifact\.json: Invalid JSON"),
        (b"\xff\xfe", r"artifact\.json: Invalid JSON"),
        (b"{}", r"artifact\.json: family: Field required"),
        (b'{"format": 9}', r"artifact\.json: format: Input should be 1"),
        (b'{"colour": "red"}', r"artifact\.json: unknown key 'colour'"),
    ],
)
def test_a_broken_manifest_is_one_line(content: bytes, message: str, base: Artifact) -> None:
    (base.path / MANIFEST).write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        adopt(base.path)
    assert "\n" not in str(error.value)


def test_nothing_there_and_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a local directory"):
        adopt(tmp_path / "nowhere")
    (tmp_path / "gpt2").mkdir()  # a name from which the stock library would guess the model
    with pytest.raises(ModelError, match=r"cannot read config\.json"):
        adopt(tmp_path / "gpt2")


def test_weights_that_are_no_weights_are_refused(base: Artifact) -> None:
    (base.path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelError, match=r"cannot read model\.safetensors"):
        adopt(base.path)


# -- digest


def test_the_digest_covers_what_is_computed_and_nothing_else(tmp_path: Path, base: Artifact) -> None:
    model = base.model()
    first = sealed(base, model, tmp_path / "one", seconds=1.0, metrics={"eval_nll": 2.0})
    (tmp_path / "deep").mkdir()
    second = sealed(base, model, tmp_path / "deep" / "two", stage="other", seconds=9.0, metrics={"eval_nll": 1.0})
    assert first.digest == second.digest

    config = json.loads((base.path / "config.json").read_text())
    for volatile in ({"transformers_version": "0.0"}, {"_name_or_path": str(tmp_path)}):
        (base.path / "config.json").write_text(json.dumps(config | volatile, indent=4))
        assert adopt(base.path).digest == base.digest
    (base.path / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-6}))
    assert adopt(base.path).digest != base.digest

    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert sealed(base, model, tmp_path / "three").digest != first.digest


def test_notes_and_tokenizers_are_hashed_and_not_in_the_digest(tmp_path: Path, base: Artifact) -> None:
    partial = tmp_path / "partial"
    save_model(base.model(), base, partial)
    (partial / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    made = seal(partial, tmp_path / "made", parent=base, traits=(), step=step(), kept={})
    assert made.digest == sealed(base, base.model(), tmp_path / "plain").digest
    assert "history.jsonl" in made.manifest.files and MANIFEST not in made.manifest.files


def test_masks_are_in_the_digest(tmp_path: Path, base: Artifact) -> None:
    digests = set()
    for i, (value, scores) in enumerate([(1.0, False), (0.5, False), (0.5, True)]):
        partial = tmp_path / f"partial{i}"
        save_model(base.model(), base, partial)
        save_masks({"layer.0.heads": torch.full((4,), value)}, partial, scores=scores)
        digests.add(seal(partial, tmp_path / str(i), parent=base, traits=["masked"], step=step(), kept={}).digest)
    assert len(digests) == 3


def test_a_model_below_a_cache_directory_is_hashed_like_any_other(tmp_path: Path, base: Artifact) -> None:
    """The hub keeps its snapshots under ``.cache``; only such a directory inside the model is none of it."""
    place = tmp_path / ".cache" / "hub" / "base"
    shutil.copytree(base.path, place)
    (place / ".cache").mkdir()
    (place / ".cache" / "lock").write_text("x")
    assert adopt(place).manifest == base.manifest and "model.safetensors" in base.manifest.files


# -- sealing


def test_sealing_that_fails_leaves_no_result(tmp_path: Path, base: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "made"

    def fail(*_: object) -> None:
        raise OSError("no space left on disk")

    for target, name in ((os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(OSError, match="no space"):
                sealed(base, base.model(), final)
        assert not final.exists()
    made = sealed(base, base.model(), final)  # what was left behind does no harm
    assert adopt(final) == made and not (tmp_path / ".partial-made").exists()


def test_the_manifest_is_written_last(tmp_path: Path, base: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies the directory while it is sealed sees no manifest before every file is there."""
    seen: list[set[str]] = []
    write_text = Path.write_text
    directory = tmp_path / ".partial-made"

    def written(path: Path, *arguments: Any, **options: Any) -> int:
        seen.append({each.name for each in directory.iterdir()} | {path.name})
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", written)
    final = sealed(base, base.model(), tmp_path / "made").path
    assert seen[-1] == {path.name for path in final.iterdir()} >= {"config.json", "model.safetensors", MANIFEST}
    assert not any(MANIFEST in names for names in seen[:-1])


def test_an_artifact_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, base: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    fsync, replace, final = os.fsync, os.replace, tmp_path / "made"
    monkeypatch.setattr(os, "fsync", lambda f: (synced.add(Path(os.readlink(f"/proc/self/fd/{f}")).name), fsync(f)))

    def renamed(source: Path, target: Path) -> None:
        assert synced == {source.name, *(path.name for path in source.iterdir())}
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    sealed(base, base.model(), final)
    assert tmp_path.name in synced and adopt(final)


def test_a_stale_result_is_replaced(tmp_path: Path, base: Artifact) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "stale.bin").write_text("old")
    made = sealed(base, base.model(), tmp_path / "made")
    assert not (tmp_path / "made" / "stale.bin").exists() and adopt(made.path) == made


# -- stock directories


@pytest.mark.parametrize(("family", "tie"), [("tiny_gpt2", True), ("tiny_gpt2", False), ("tiny_bart", True)])
def test_shared_tensors_are_stored_once(family: str, tie: bool, request: Any, tmp_path: Path) -> None:
    model = request.getfixturevalue(family)(layers=1, tie=tie)
    model.save_pretrained(tmp_path / "base")
    base = adopt(tmp_path / "base")
    save_model(base.model(), base, tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert ("lm_head.weight" in ours) == (not tie)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert sum(tensor.numel() for tensor in ours.values()) == sum(p.numel() for p in stock_state(model).values())


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
def test_trained_cut_and_masked_directories_open_without_this_package(
    tmp_path: Path, tiny_gpt2: Any, tiny_bart: Any, tiny_inputs: Any
) -> None:
    places, expected = [], {}
    for kind, make in (("gpt2", tiny_gpt2), ("bart", tiny_bart)):
        model = make(layers=1)
        model.save_pretrained(tmp_path / kind)
        base = adopt(tmp_path / kind)
        inputs = tiny_inputs(model)
        halves = {axis.name: list(range(0, axis.size, 2)) for axis in base.family().axes(model.config)}
        small = base.model()
        cut(small, base.family(), halves)
        masked = base.model()
        attach(masked, base.family(), ["hidden", "heads", "ffn"])
        for mask in masks_of(masked).values():
            torch.nn.init.uniform_(mask, 0.2, 0.8)
        made = {"whole": (base.model(), model), "cut": (small, small), "masked": (masked, model)}
        for name, (saved, same) in made.items():
            place = tmp_path / f"{kind}-{name}"
            sealed(base, saved if name != "masked" else base.model(), place, kept=halves if name == "cut" else {})
            save_file(inputs, f"{place}.inputs")
            places.append((str(place), kind))
            expected[str(place)] = logits(same, inputs)
    ours = {name: os.environ[name] for name in os.environ if not name.startswith("PYTHON")}
    command = [sys.executable, "-c", STOCK, json.dumps(places)]
    done = subprocess.run(command, cwd=tmp_path, env=ours, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for place, same in expected.items():
        torch.testing.assert_close(load_file(f"{place}.logits")["logits"], same, atol=1e-6, rtol=1e-5)


def test_a_masked_artifact_is_the_base_to_others_and_soft_masked_to_us(
    tmp_path: Path, base: Artifact, tiny_inputs: Any
) -> None:
    partial = tmp_path / "partial"
    copy_settings(base.path, partial)
    shutil.copyfile(base.path / "model.safetensors", partial / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    masks = {axis: torch.rand(size, generator=generator) for axis, size in base.sizes().items()}
    save_masks(masks, partial, scores=False)
    made = seal(partial, tmp_path / "made", parent=base, traits=["masked"], step=step(), kept={})
    model = compress.load(made.path)
    assert {axis: mask.tolist() for axis, mask in masks_of(model).items()} == {a: m.tolist() for a, m in masks.items()}
    by_hand = base.model()
    attach(by_hand, base.family(), ["hidden", "heads", "ffn"], values=masks)
    inputs = tiny_inputs(model)
    assert torch.equal(logits(model, inputs), logits(by_hand, inputs))
    assert not torch.allclose(logits(model, inputs), logits(base.model(), inputs))


def test_scores_rank_units_and_mask_nothing(tmp_path: Path, base: Artifact, tiny_inputs: Any) -> None:
    partial = tmp_path / "partial"
    save_model(base.model(), base, partial)
    scores = {"layer.0.heads": torch.tensor([3.0, 0.0, 7.0, 1.0])}
    save_masks(scores, partial, scores=True)
    made = seal(partial, tmp_path / "made", parent=base, traits=["masked"], step=step(), kept={})
    assert made.masks()["layer.0.heads"].tolist() == [3.0, 0.0, 7.0, 1.0]
    model = made.model()
    assert masks_of(model)["layer.0.heads"].tolist() == [1.0] * 4
    inputs = tiny_inputs(model)
    torch.testing.assert_close(logits(model, inputs), logits(base.model(), inputs))


def test_generation_settings_in_an_old_config_come_along(tmp_path: Path, tiny_bart: Any) -> None:
    tiny_bart(layers=1).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    settings = {"num_beams": 4, "no_repeat_ngram_size": 3, "forced_bos_token_id": 0}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | settings))
    base = adopt(tmp_path / "base")
    made = sealed(base, base.model(), tmp_path / "made")
    again: Any = sealed(made, made.model(), tmp_path / "again").model()
    found = again.generation_config.to_dict()
    assert {name: found[name] for name in settings} == settings


@pytest.mark.parametrize("family", FAMILIES)
def test_no_path_of_this_machine_is_written(family: str, request: Any, tmp_path: Path) -> None:
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 265, GPT2)
    model = request.getfixturevalue(family)(layers=1, vocab=len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = adopt(tmp_path / "base")
    loaded: Any = base.model()
    assert loaded.config.name_or_path == str(base.path)
    made = sealed(base, loaded, tmp_path / "made")
    assert made.tokenizer().encode("the cat") == tokenizer.encode("the cat")
    for file in made.path.iterdir():
        assert os.fsencode(tmp_path) not in file.read_bytes(), file.name


def test_what_is_copied_beside_the_weights(tmp_path: Path, base: Artifact) -> None:
    for name in ("merges.txt", "chat_template.jinja", "model.safetensors.index.json", "history.jsonl", "details.json"):
        (base.path / name).write_text("{}")
    copy_settings(base.path, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "merges.txt", "chat_template.jinja"}


def test_weights_in_several_files_open(tmp_path: Path, base: Artifact, tiny_inputs: Any) -> None:
    model: Any = base.model()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = adopt(tmp_path / "shards")
    inputs = tiny_inputs(model)
    assert torch.equal(logits(shards.model(), inputs), logits(model, inputs))
    made = sealed(shards, shards.model(), tmp_path / "made")
    with safe_open(made.path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert torch.equal(logits(made.model(), inputs), logits(model, inputs))


def test_paths_and_strangers_stay_behind(tmp_path: Path, base: Artifact) -> None:
    secret = "/home/someone/models/x"
    config = json.loads((base.path / "config.json").read_text()) | {"_name_or_path": secret}
    (base.path / "config.json").write_text(json.dumps(config))
    (base.path / "tokenizer_config.json").write_text(json.dumps({"name_or_path": secret, "model_max_length": 9}))
    (base.path / "notes.txt").write_text("private")
    copy_settings(base.path, tmp_path / "out")
    texts = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    assert "notes.txt" not in texts
    assert json.loads(texts["tokenizer_config.json"]) == {"model_max_length": 9}
    assert not any("someone" in text for text in texts.values())


def test_what_lies_in_directories_below_is_no_part_of_a_model(tmp_path: Path, base: Artifact) -> None:
    (base.path / "runs").mkdir()
    (base.path / "runs" / "other.safetensors").write_bytes(b"x" * 100)
    assert adopt(base.path).manifest == base.manifest
