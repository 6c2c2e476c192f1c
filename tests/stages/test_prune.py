"""Pruning: exact sizes, the right units, and models that compute what the masked ones did."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import compress
from compress.artifact import MANIFEST, Artifact, adopt, save_masks, save_model, seal
from compress.errors import ModelError, NothingDoneError
from compress.models.stock_files import copy_settings
from compress.models.structure import count_parameters, stock_tensors
from compress.registry import STAGES
from compress.surgery.cut import cut
from compress.surgery.masks import attach

KINDS = ("hidden", "heads", "ffn")
FAMILIES = ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"]
STOCK = {
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "bart": AutoModelForSeq2SeqLM,
    "mbart": AutoModelForSeq2SeqLM,
}


@pytest.fixture
def base(request: Any, stock: Any) -> Any:
    def make(family: str = "tiny_gpt2", name: str = "base", **options: Any) -> Artifact:
        ffn = None if family == "tiny_gpt2" else 48
        options |= {"kv_heads": options.get("heads", 4)} if family == "tiny_llama" else {}
        made: Artifact = stock(request.getfixturevalue(family)(**{"ffn": ffn, **options}), name)
        return made

    return make


@pytest.fixture
def masked(tmp_path: Any) -> Any:
    """A masked artifact whose masks are drawn at random, signs included."""

    def make(source: Artifact, kinds: Any = KINDS, seed: int = 0, name: str = "masked") -> Artifact:
        generator = torch.Generator().manual_seed(seed)
        axes = source.family().axes(source.config())
        sizes = source.sizes()
        masks = {
            axis.name: (0.2 + torch.rand(sizes[axis.name], generator=generator))
            * (1 - 2 * torch.randint(2, (sizes[axis.name],), generator=generator))
            for axis in axes
            if axis.kind in kinds
        }
        partial = tmp_path / f".partial-{name}"
        copy_settings(source.path, partial)
        (partial / "model.safetensors").write_bytes((source.path / "model.safetensors").read_bytes())
        save_masks(masks, partial, scores=False)
        fields = {"stage": name, "type": "learn_masks", "version": 1, "config": {}, "seed": 0, "inputs": {}}
        step = {**fields, "packages": {}, "seconds": 0.0}
        traits = sorted({*source.traits, "masked"})
        seal(partial, tmp_path / name, parent=source, traits=traits, step=step, kept=source.manifest.kept)
        return adopt(tmp_path / name)

    return make


def prune(**config: Any) -> dict[str, Any]:
    return {"type": "prune", **config}


def logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def counted(model: Any) -> int:
    return sum(tensor.numel() for tensor in stock_tensors(model))


# -- which units, and how many


@pytest.mark.parametrize("keep", ["2/4", 0.5, "1/2", {"hidden": "2/4", "heads": "2/4", "ffn": "2/4"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fraction_is_exact_and_the_largest_masks_stay(
    keep: Any, family: str, base: Any, masked: Any, run_stage: Any
) -> None:
    source = masked(base(family))
    made = run_stage(prune(keep=keep), source)
    assert made.traits == {"pruned"} and made.sizes() == {axis: size // 2 for axis, size in source.sizes().items()}
    for axis, mask in source.masks().items():
        kept = made.manifest.kept[axis]
        assert kept == sorted(kept)
        lost = sorted(set(range(len(mask))) - set(kept))
        assert mask[kept].abs().min() > mask[lost].abs().max()
    coverage = made.manifest.lineage[-1].coverage
    assert coverage["bytes_after"] == 4 * counted(made.model()) < coverage["bytes_before"]


def test_each_kind_has_its_own_fraction_and_others_stay(base: Any, masked: Any, run_stage: Any) -> None:
    source = masked(base())
    made = run_stage(prune(keep={"heads": "3/4", "ffn": "1/8"}), source)
    assert made.sizes() == {"hidden": 32} | {
        f"layer.{n}.{kind}": size for n in range(2) for kind, size in (("heads", 3), ("ffn", 16))
    }


@pytest.mark.parametrize(
    ("config", "expressible"),
    [
        ({"keep": {"heads": "1/2"}}, False),
        ({"keep": {"hidden": "1/2"}}, False),
        ({"keep": {"ffn": "1/2"}}, True),
        ({"keep": "1/2"}, True),
        ({"keep": "0.6", "uniform": False}, False),
    ],
)
def test_a_shape_without_stock_class_is_reported(
    config: Any, expressible: bool, base: Any, masked: Any, run_stage: Any, shape_of: Any
) -> None:
    source = masked(base())
    made = run_stage(prune(**config), source)
    reported = "" if expressible else "opens with compress.load only"
    assert made.manifest.lineage[-1].coverage["note"] == reported
    assert made.stock_shape() == expressible
    assert STAGES.read(prune(**config)).shape(shape_of(source, masked=("hidden", "heads", "ffn"))).note == reported


@pytest.mark.slow
def test_one_set_of_masks_makes_many_sizes(base: Any, masked: Any, run_stage: Any) -> None:
    source = masked(base())
    small, middle, large = (run_stage(prune(keep=f"{n}/4"), source, out=str(n)) for n in (1, 2, 3))
    for axis in source.sizes():
        a, b, c = (set(made.manifest.kept[axis]) for made in (small, middle, large))
        assert a < b < c
    assert len({made.digest for made in (small, middle, large)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [0.5, 0.95, 12_000])
def test_a_budget_takes_the_largest_uniform_cut_within_it(
    budget: float, family: str, base: Any, masked: Any, run_stage: Any
) -> None:
    source = masked(base(family))
    made = run_stage(prune(parameters=budget), source)
    whole, axes = source.model(), source.family().axes(source.config())
    limit = budget * counted(whole) if budget <= 1 else budget
    (ratio,) = {size / source.sizes()[axis] for axis, size in made.sizes().items()}
    counts = {n: count_parameters(whole, axes, {a: s * n // 4 for a, s in source.sizes().items()}) for n in range(1, 5)}
    assert ratio == max(n for n, count in counts.items() if count <= limit) / 4
    assert counted(made.model()) == counts[int(4 * ratio)]


def test_a_budget_counts_axes_that_carry_no_mask_as_they_are(
    base: Any, masked: Any, run_stage: Any, shape_of: Any
) -> None:
    """An uneven source keeps the config of its root; its own smaller tensors must be counted."""
    first = run_stage(prune(keep={"ffn": "1/8"}, uniform=False), masked(base(), kinds=("ffn",)), out="first")
    source = masked(first, kinds=("heads",), name="again")
    whole = counted(source.model())
    axes = first.family().axes(source.config())
    halves = {axis: 2 if axis.endswith("heads") else size for axis, size in source.sizes().items()}
    budget = count_parameters(source.model(), axes, halves)
    stage = STAGES.read(prune(parameters=budget))
    assert run_stage(prune(parameters=budget), source, out="made").sizes() == halves
    known = shape_of(source, traits=source.traits, masked=("heads",))
    assert stage.shape(known).sizes == halves and budget < whole


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_knows_the_sizes_that_come_out(
    family: str, base: Any, masked: Any, run_stage: Any, shape_of: Any
) -> None:
    source = masked(base(family))
    known = shape_of(source, masked=KINDS)
    for config in (prune(keep="1/4"), prune(keep={"ffn": "2/8"}), prune(parameters=0.4)):
        made = run_stage(config, source, out="made")
        after = STAGES.read(config).shape(known)
        assert (after.sizes, after.traits, after.masked) == (made.sizes(), made.traits, ())


# -- the model that is left


@pytest.mark.slow
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_units_count_in_full_unless_masks_are_folded(
    family: str, scale: bool, base: Any, masked: Any, run_stage: Any, tiny_inputs: Any
) -> None:
    """fold: false is the binary mask's model, fold: true the soft mask's with the removed units at 0."""
    source = masked(base(family, **({"scale_embedding": scale} if "bart" in family else {})))
    inputs = tiny_inputs(source.model())
    for fold in (False, True):
        made = run_stage(prune(keep="2/4", fold=fold), source, out=f"fold-{fold}")
        plain = adopt(source.path.parent / "base").model()
        masks = {}
        for axis, mask in source.masks().items():
            masks[axis] = torch.zeros_like(mask)
            kept = made.manifest.kept[axis]
            masks[axis][kept] = mask[kept] if fold else 1.0
        attach(plain, source.family(), KINDS, values=masks)
        torch.testing.assert_close(logits(made.model(), inputs), logits(plain, inputs), atol=2e-5, rtol=1e-4)


RELOAD = """
import sys
sys.modules["compress"] = None
import torch
from transformers import AutoModelForSeq2SeqLM
for path in sys.argv[1:]:
    inputs, logits, texts = torch.load(path + "/case.pt", weights_only=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    inputs.pop("decoder_input_ids")
    for num_beams, text in texts.items():
        found = model.generate(**inputs, num_beams=num_beams, max_new_tokens=8, do_sample=False)
        assert torch.equal(found, text), (path, num_beams, found, text)
"""


@pytest.mark.slow
def test_a_uniform_cut_of_an_encoder_and_decoder_needs_the_stock_library_alone(
    base: Any, masked: Any, run_stage: Any, tiny_inputs: Any
) -> None:
    """In a process that cannot import this package: logits, and text greedy and with beams."""
    shape = {"layers": 2, "decoder_layers": 1, "heads": 4, "decoder_heads": 2, "ffn": 26, "decoder_ffn": 14}
    made = []
    for number, (tie, scale) in enumerate(((True, False), (True, True), (False, True))):
        source = base("tiny_bart", **shape, tie=tie, scale_embedding=scale, name=f"base-{number}")
        cut = run_stage(prune(keep="1/2"), masked(source, name=f"masks-{number}"), out=f"cut-{number}")
        config, model = cut.config(), cut.model()
        assert (config.encoder_attention_heads, config.decoder_attention_heads) == (2, 1)
        assert (config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim) == (16, 13, 7)
        assert (config.encoder_layers, config.decoder_layers) == (2, 1)
        inputs = tiny_inputs(model, batch=4)
        sources = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder")}
        texts = {
            num_beams: model.generate(**sources, num_beams=num_beams, max_new_tokens=8, do_sample=False)
            for num_beams in (1, 4)
        }
        torch.save((inputs, logits(model, inputs), texts), cut.path / "case.pt")
        made.append(str(cut.path))
    done = subprocess.run([sys.executable, "-c", RELOAD, *made], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_cut_is_a_stock_model_of_the_counted_size(
    family: str, base: Any, masked: Any, run_stage: Any, tiny_inputs: Any
) -> None:
    source = masked(base(family))
    made = run_stage(prune(keep="1/4"), source)
    model, report = STOCK[made.manifest.family].from_pretrained(made.path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    whole, axes = source.model(), source.family().axes(source.config())
    assert counted(model) == count_parameters(whole, axes, {a: s // 4 for a, s in source.sizes().items()})
    inputs = tiny_inputs(model)
    assert torch.equal(logits(model.eval(), inputs), logits(made.model(), inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_uneven_cut_reloads_here_and_fails_loudly_elsewhere(
    family: str, base: Any, masked: Any, run_stage: Any, tiny_inputs: Any
) -> None:
    root = base(family)
    source = masked(root)
    made = run_stage(prune(keep={"heads": "2/4", "ffn": "1/3", "hidden": "5/8"}, uniform=False), source)
    sizes = made.sizes()
    for kind, ratio in (("heads", 1 / 2), ("ffn", 1 / 3)):
        before = [size for axis, size in source.sizes().items() if axis.endswith(kind)]
        after = [size for axis, size in sizes.items() if axis.endswith(kind)]
        assert min(after) >= 1 and sum(after) == sum(round(size * ratio) for size in before)
    assert len({size for axis, size in sizes.items() if axis.endswith("ffn")}) > 1
    in_memory = root.model()
    cut(in_memory, root.family(), made.manifest.kept)
    loaded: Any = compress.load(made.path)
    inputs = tiny_inputs(loaded)
    assert torch.equal(logits(loaded, inputs), logits(in_memory, inputs))
    stored = load_file(made.path / "model.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert name not in stored or torch.equal(tensor, stored[name])
    with pytest.raises((RuntimeError, ValueError)):
        STOCK[made.manifest.family].from_pretrained(made.path)


def test_uneven_cuts_leave_one_head_in_every_layer(base: Any, tmp_path: Any, masked: Any, run_stage: Any) -> None:
    root = base(layers=3)
    partial = tmp_path / "weak"
    save_model(root.model(), root, partial)
    scores = {f"layer.{n}.heads": torch.full((4,), float(n)) for n in range(3)}  # one layer far above the others
    save_masks(scores, partial, scores=True)
    step = {
        "stage": "s",
        "type": "s",
        "version": 1,
        "config": {},
        "seed": 0,
        "inputs": {},
        "packages": {},
        "seconds": 0,
    }
    source = seal(partial, tmp_path / "scored", parent=root, traits=["masked"], step=step, kept={})
    made = run_stage(prune(keep="2/4", uniform=False), source)
    assert [made.sizes()[f"layer.{n}.heads"] for n in range(3)] == [1, 1, 4]


@pytest.mark.slow
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_cuts_are_one_cut_of_the_root(
    family: str, uniform: bool, base: Any, masked: Any, run_stage: Any, tiny_inputs: Any
) -> None:
    root = base(family)
    first = run_stage(prune(keep="3/4", uniform=uniform), masked(root), out="first")
    keep = {"hidden": "1/2", "heads": "1/3", "ffn": "1/2"}
    second = run_stage(prune(keep=keep, uniform=uniform), masked(first, seed=1, name="again"), out="second")
    assert second.manifest.root == root.digest and second.manifest.sizes == root.sizes()
    for axis, kept in second.manifest.kept.items():
        assert set(kept) < set(first.manifest.kept[axis]) and kept == sorted(kept)
        assert len(kept) == second.sizes()[axis]
    whole = root.model()
    cut(whole, root.family(), second.manifest.kept)
    inputs = tiny_inputs(whole)
    torch.testing.assert_close(logits(second.model(), inputs), logits(whole, inputs), atol=1e-6, rtol=1e-5)


def test_a_run_repeats_itself(base: Any, masked: Any, run_stage: Any) -> None:
    source = masked(base())
    one, two = (run_stage(prune(keep="2/4"), source, out=out) for out in ("one", "two"))
    assert one.digest == two.digest
    assert str(source.path.parent).encode() not in (one.path / MANIFEST).read_bytes()


# -- what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (prune(keep="1/3"), r"keep: 1/3 of the 32 units of hidden is not a whole number; allowed: 1/4, 2/4, 3/4, or"),
        (prune(keep={"heads": "1/3"}), r"1/3 of the 4 units of layer\.0\.heads .* allowed: 1/4, 2/4, 3/4, or"),
        (prune(keep={"ffn": "1/7"}), r"allowed: 1/128, 2/128, .*, 16/128, \.\.\., or uniform: false, which rounds"),
        (
            prune(parameters=0.01),
            r"parameters: 0\.01 is below the smallest uniform cut, 1/4 of every axis; allowed: at",
        ),
        (prune(parameters=7), r"parameters: 7 is below"),
    ],
)
def test_sizes_that_cannot_be_are_reported_twice(
    config: Any, message: str, base: Any, masked: Any, run_stage: Any, shape_of: Any
) -> None:
    """By the check, from the shape alone, and by the run."""
    source = masked(base())
    (problem,) = STAGES.read(config).problems(shape_of(source, masked=KINDS), None)
    with pytest.raises(ModelError, match=message) as error:
        run_stage(config, source)
    assert error.value.problem == problem


def test_a_kind_without_masks_is_not_passed_over(base: Any, masked: Any, run_stage: Any, shape_of: Any) -> None:
    source = masked(base(), kinds=("ffn", "hidden"))
    config = prune(keep={"ffn": "2/4", "heads": "2/4"})
    with pytest.raises(ModelError, match=r"keep\.heads: the source has no such masks; it has ffn, hidden"):
        run_stage(config, source)
    assert len(list(STAGES.read(config).problems(shape_of(source, masked=("ffn", "hidden")), None))) == 1


def test_scores_have_nothing_to_fold(base: Any, masked: Any, shape_of: Any) -> None:
    stage = STAGES.read(prune(keep="1/2", fold=True))
    (problem,) = stage.problems(shape_of(base(), masked=KINDS, scored=True), None)
    assert str(problem) == "fold: 'base' has scores, and masks that are 1 change nothing; allowed: false"
    assert not list(stage.problems(shape_of(base(), masked=KINDS, scored=False), None))


@pytest.mark.parametrize("config", [prune(keep=1), prune(keep={}), prune(parameters=1), prune(parameters=10**9)])
def test_a_cut_that_removes_nothing_is_refused(
    config: Any, base: Any, masked: Any, run_stage: Any, shape_of: Any
) -> None:
    source = masked(base())
    field = "keep" if "keep" in config else "parameters"
    assert list(map(str, STAGES.read(config).problems(shape_of(source, masked=KINDS), None))) == [
        f"{field}: every unit would stay"
    ]
    with pytest.raises(NothingDoneError, match="none of .* modules was touched"):
        run_stage(config, source)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (prune(), "give either keep"),
        (prune(keep="1/2", parameters=0.5), "give either keep"),
        (prune(keep="half"), "write an exact fraction such as 2/4"),
        (prune(keep="1/0"), "write an exact fraction such as 2/4"),
        (prune(keep="5/4"), "less than or equal to 1"),
        (prune(keep="0"), "greater than 0"),
        (prune(keep="-1/4"), "greater than 0"),
        (prune(parameters=-3), "greater than 0"),
        (prune(parameters=float("nan")), "finite number"),
    ],
)
def test_fields_are_checked(config: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        STAGES.read(config)


def test_a_plan_survives_its_own_record() -> None:
    stage = STAGES.read(prune(keep={"heads": "2/4", "ffn": 0.25}))
    assert STAGES.read(stage.model_dump(mode="json")) == stage


def test_groups_of_query_heads_are_cut_whole(masked: Any, run_stage: Any, stock: Any, tiny_llama: Any) -> None:
    source = stock(tiny_llama(heads=6, kv_heads=3, hidden=36), "grouped")
    made = run_stage({"type": "prune", "keep": {"groups": "2/3"}}, masked(source, kinds=("groups",)))
    kept = made.manifest.kept
    for n in range(2):
        held = [2 * group + at for group in kept[f"layer.{n}.groups"] for at in range(2)]
        assert len(kept[f"layer.{n}.groups"]) == 2 and kept[f"layer.{n}.heads"] == held
    config = made.config()
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert AutoModelForCausalLM.from_pretrained(made.path).model.layers[0].self_attn.k_proj.out_features == 12


def test_query_heads_are_cut_within_their_groups(
    masked: Any, run_stage: Any, shape_of: Any, stock: Any, tiny_llama: Any
) -> None:
    source = masked(stock(tiny_llama(), "grouped"))
    made = run_stage({"type": "prune", "keep": "2/4"}, source)
    assert (made.config().num_attention_heads, made.config().num_key_value_heads) == (2, 2)
    assert all(units[0] < 2 <= units[1] for axis, units in made.manifest.kept.items() if axis.endswith(".heads"))
    stage = STAGES.read({"type": "prune", "keep": {"heads": "1/4"}})
    reported = list(stage.problems(shape_of(source, masked=KINDS), None))
    assert "does not leave the same number in each of 2 groups; allowed: 1/2, or masks on groups" in str(reported[0])
