"""What the figures of a report are drawn from."""

from compress.report.plots import weights_of
from compress.report.read import Manifest, Stage, StageRun, Step
from compress.report.render import _of_evaluations, _of_losses


def stage_of(config, *history, kind="distill"):
    lineage = (Step(stage="s", type=kind, config=config),)
    return Stage(StageRun(name="s", type=kind, path="s"), Manifest(lineage=lineage), history, {})


def test_terms_are_weighted_under_the_names_of_the_training_curve():
    terms = [{"type": "forward_kl", "weight": 1.0}, {"type": "hidden_mse", "weight": 0.1}, {"type": "hidden_mse"}]
    found = weights_of(stage_of({"terms": terms}))
    assert found == {"forward_kl": 1.0, "hidden_mse.1": 0.1, "hidden_mse.2": 1.0}


def test_captions_speak_of_what_is_drawn():
    one, two = {"loss": 1.0, "terms": {"a": 1.0}}, {"loss": 2.0, "terms": {"a": 1.0, "b": 1.0}}
    assert _of_losses(stage_of({}, one)) == "The training loss."
    assert "weighted" in _of_losses(stage_of({}, two))
    assert "chose" in _of_evaluations(stage_of({"train": {"keep": "best"}}))
    assert "chose" not in _of_evaluations(stage_of({"train": {"keep": "last"}}))
    assert "chose" not in _of_evaluations(stage_of({"train": {"keep": "best"}}, kind="learn_masks"))
