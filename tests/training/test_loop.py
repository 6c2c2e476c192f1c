"""The loop: best checkpoint, what stops it, and interrupted + resumed == straight."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from compress.data import DataSpec, ModelInterface, open_data
from compress.errors import DataError, DivergedError, NothingDoneError
from compress.models import family_of
from compress.models.dropout import set_dropout
from compress.terms.logits import CrossEntropy, ForwardKL
from compress.terms.token_contrastive import TokenContrastive
from compress.training.checkpoint import Checkpoints
from compress.training.config import TrainConfig
from compress.training.forward import Side, nll
from compress.training.history import History
from compress.training.loop import Place, train
from compress.training.objective import Objective


@pytest.fixture
def data(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 67, (24, 9), generator=generator).tolist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    source = {"json": "rows.jsonl", "input_ids": "ids"}
    spec = DataSpec.model_validate({"train": source, "eval": source})
    return open_data(spec, tokenizer=None, model=ModelInterface("causal", 64, 67), base=tmp_path)


def _objective(tiny_gpt2, **contrast):
    torch.manual_seed(0)
    student, teacher = tiny_gpt2(seed=0).train(), tiny_gpt2(seed=1)
    terms = [CrossEntropy(), ForwardKL(), TokenContrastive(size=8, **contrast)]
    sides = [Side(model, family_of(model.config)) for model in (student, teacher)]
    return Objective(sides[0], terms, teacher=sides[1])


def test_a_bank_of_positions_has_the_rows_of_a_decoder(tiny_bart, tmp_path):
    rows = [{"ids": [5] * 9, "labels": [6] * size} for size in (3, 4, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec.model_validate({"train": {"json": "rows.jsonl", "input_ids": "ids", "labels": "labels"}})
    objective = _objective(tiny_bart, bank="position")
    interface = ModelInterface.of(objective.student.config)
    data = open_data(spec, tokenizer=None, model=interface, base=tmp_path)
    _run(objective, data, tmp_path / "out", _config(steps=3, batch=3))
    bank = objective.parts["0"].bank
    assert bank.shape == (3, 4, 8)
    assert bank.any(-1).sum(-1).tolist() == [3, 4, 2]


def _config(**options):
    options = {"steps": 12, "batch": 4, "eval_every": 3, "lr": 1e-3, "precision": "fp32"} | options
    return TrainConfig.model_validate(options)


def _run(objective, data, out: Path, config):
    out.mkdir(exist_ok=True)
    groups = {"weights": list(objective.student.parameters())}
    return train(objective, groups, data.train, data.eval, config, Place(out, seed=3, bar=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "contrast"),
    [
        (4, {}),
        (7, {}),
        (11, {}),
        (5, {"num_negatives": 2}),
        (5, {"num_negatives": 2, "negatives": "student"}),
        (5, {"num_negatives": 2, "negatives": "vocabulary"}),
        (7, {"bank": "position"}),
    ],
)
def test_interrupted_and_resumed_equals_straight(stop, contrast, tiny_gpt2, data, tmp_path, monkeypatch):
    config = _config(accumulate=2)
    straight = _objective(tiny_gpt2, **contrast)
    first = _run(straight, data, tmp_path / "straight", config)

    objective = _objective(tiny_gpt2, **contrast)
    calls = {"n": 0}
    original = Objective.forward

    def interrupted(self, batch):
        calls["n"] += 1
        if calls["n"] == 2 * stop + 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(Objective, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(objective, data, tmp_path / "resumed", config)
    monkeypatch.undo()
    fresh = _objective(tiny_gpt2, **contrast)
    second = _run(fresh, data, tmp_path / "resumed", config)
    assert first == second
    for (name, a), b in zip(straight.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    curves = [
        [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in path.read_text().splitlines()]
        for path in (tmp_path / "straight/history.jsonl", tmp_path / "resumed/history.jsonl")
    ]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_a_crash_resumes_from_the_last_whole_checkpoint(tiny_gpt2, data, tmp_path, monkeypatch):
    straight = _objective(tiny_gpt2)
    _run(straight, data, tmp_path / "straight", _config())
    objective = _objective(tiny_gpt2)
    monkeypatch.setattr(Checkpoints, "keep_best", _crash_after(Checkpoints.keep_best, 3))
    with pytest.raises(OSError, match="disk"):
        _run(objective, data, tmp_path / "crashed", _config())
    monkeypatch.undo()
    fresh = _objective(tiny_gpt2)
    _run(fresh, data, tmp_path / "crashed", _config())
    for a, b in zip(straight.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def _crash_after(original, times):
    calls = {"n": 0}

    def keep(self, model):
        calls["n"] += 1
        if calls["n"] == times:
            raise OSError("no space left on disk")
        return original(self, model)

    return keep


@pytest.mark.slow
def test_two_runs_of_one_seed_agree_and_another_differs(tiny_gpt2, data, tmp_path):
    states = []
    for i, seed in enumerate((3, 3, 4)):
        objective = _objective(tiny_gpt2)
        out = tmp_path / str(i)
        out.mkdir()
        groups = {"weights": list(objective.student.parameters())}
        train(objective, groups, data.train, None, _config(), Place(out, seed=seed, bar=False))
        states.append(objective.state_dict()["student.transformer.wte.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.slow
def test_the_best_weights_are_handed_on(tiny_gpt2, data, tmp_path):
    """At a rate that ruins the model the best evaluation is an early one; keep: last must differ."""
    kept = {}
    for keep in ("best", "last"):
        objective = _objective(tiny_gpt2)
        trained = _run(objective, data, tmp_path / keep, _config(keep=keep, lr=1.0, schedule="constant", clip=None))
        lines = [json.loads(line) for line in (tmp_path / keep / "history.jsonl").read_text().splitlines()]
        evaluations = {line["step"]: line["eval_nll"] for line in lines if "eval_nll" in line}
        assert trained.best_nll == min(evaluations.values())
        kept[keep] = objective.state_dict()["student.transformer.wte.weight"]
    assert min(evaluations, key=evaluations.get) != max(evaluations)
    assert not torch.equal(kept["best"], kept["last"])


def _pairs(model, tmp_path, **splits):
    """Splits of (source, target) rows for an encoder-decoder."""
    spec = {}
    for name, rows in splits.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"ids": source, "labels": target}) + "\n" for source, target in rows)
        )
        spec[name] = {"json": f"{name}.jsonl", "input_ids": "ids", "labels": "labels"}
    interface = ModelInterface.of(model.config)
    return open_data(DataSpec.model_validate(spec), tokenizer=None, model=interface, base=tmp_path)


@pytest.mark.slow
def test_the_best_weights_of_an_encoder_and_decoder_are_handed_on(tiny_bart, tmp_path):
    """Rows learnt by heart make others less likely: the best evaluation on data.eval is not the last one."""
    model = tiny_bart(layers=1, hidden=16)
    draws = torch.randint(3, 67, (2, 12, 8), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [[(row, row[: 2 + i % 5]) for i, row in enumerate(rows)] for rows in draws]
    data = _pairs(model, tmp_path, train=pairs[0], eval=pairs[1])
    kept = {}
    for keep in ("best", "last"):
        student = Side(tiny_bart(layers=1, hidden=16), family_of(model.config))
        config = _config(keep=keep, steps=40, lr=2e-2, schedule="constant", dropout=0.0)
        with set_dropout(student.model, 0.0):
            trained = _run(Objective(student, [CrossEntropy()]), data, tmp_path / keep, config)
        lines = [json.loads(line) for line in (tmp_path / keep / "history.jsonl").read_text().splitlines()]
        evaluations = {line["step"]: line["eval_nll"] for line in lines if "eval_nll" in line}
        best = min(evaluations, key=evaluations.get)
        assert (trained.best_step, trained.best_nll) == (best, evaluations[best]) and best < 30
        totals = [nll(student, batch) for batch in data.eval.loader(5)]
        kept[keep] = sum(value for value, _ in totals) / sum(count for _, count in totals)
        assert kept[keep] == pytest.approx(trained.metrics["eval_nll"], rel=1e-5)
        assert kept[keep] == pytest.approx(evaluations[best if keep == "best" else 40], rel=1e-5)
    assert kept["best"] < kept["last"] - 0.1


@pytest.mark.parametrize("empty", ["train", "eval"])
def test_a_batch_whose_targets_are_all_padding_stops(tiny_bart, tmp_path, empty):
    student = Side(tiny_bart(layers=1, hidden=16), family_of(tiny_bart().config))
    rows = [([5, 6, 7], [8, 2])] * 2
    splits = {"train": rows, "eval": rows} | {empty: [*rows, ([5, 6], [-100, -100])]}
    data = _pairs(student.model, tmp_path, **splits)
    with pytest.raises(DataError, match=rf"data\.{empty}: no token of a batch is scored"):
        _run(Objective(student, [CrossEntropy()]), data, tmp_path / "out", _config(batch=1, steps=3))


def test_a_loss_that_is_not_finite_stops_with_step_term_and_checkpoint(tiny_gpt2, data, tmp_path, monkeypatch):
    objective = _objective(tiny_gpt2)
    calls = {"n": 0}
    original = ForwardKL.per_token

    def broken(self, student, teacher, labels):
        calls["n"] += 1
        return original(self, student, teacher, labels) * (float("nan") if calls["n"] > 4 else 1.0)

    monkeypatch.setattr(ForwardKL, "per_token", broken)
    message = r"loss is nan at step 5 \(term forward_kl\); the last good checkpoint is .*step-00000003"
    with pytest.raises(DivergedError, match=message):
        _run(objective, data, tmp_path / "out", _config())


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    History(path, keep_until=2).write(step=3, loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("torn", ["\x00" * 40 + "\n", '{"step": 2, "lo\n', "[]\n", "3\n", "\udcff\n"])
def test_a_line_that_power_loss_tore_is_dropped(torn, tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(('{"step": 1}\n' + torn + '{"step": 3}\n').encode(errors="surrogateescape"))
    History(path, keep_until=3).write(step=4, loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.safetensors", "best.safetensors"])
def test_a_torn_checkpoint_ends_where_a_straight_run_ends(name, tiny_gpt2, data, tmp_path, monkeypatch, capsys):
    straight = _objective(tiny_gpt2)
    _run(straight, data, tmp_path / "straight", _config())
    monkeypatch.setattr(Checkpoints, "keep_best", _crash_after(Checkpoints.keep_best, 3))
    with pytest.raises(OSError, match="disk"):
        _run(_objective(tiny_gpt2), data, tmp_path / "torn", _config())
    monkeypatch.undo()
    path = next((tmp_path / "torn" / "checkpoints").rglob(name))
    path.write_bytes(path.read_bytes()[:100])
    fresh = _objective(tiny_gpt2)
    groups = {"weights": list(fresh.student.parameters())}
    capsys.readouterr()
    train(fresh, groups, data.train, data.eval, _config(), Place(tmp_path / "torn", seed=3, name="tuned"))
    (warning, *_) = capsys.readouterr().err.splitlines()
    assert warning.startswith("tuned: ") and f"step-00000006 cannot be read ({name}: " in warning
    assert warning.endswith("; training continues from step 0")
    for a, b in zip(straight.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_nothing_to_train_raises(tiny_gpt2, data, tmp_path):
    model = tiny_gpt2().requires_grad_(False)
    objective = Objective(Side(model, family_of(model.config)), [CrossEntropy()])
    with pytest.raises(NothingDoneError, match="frozen"):
        _run(objective, data, tmp_path / "out", _config())


def _ragged(tmp_path):
    """Rows whose numbers of scored tokens differ a lot."""
    rows = [{"ids": list(range(3, 12)), "labels": [-100] * (9 - n) + list(range(3, 3 + n))} for n in (1, 8, 2, 3)]
    (tmp_path / "ragged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"json": "ragged.jsonl", "input_ids": "ids", "labels": "labels"}
    spec = DataSpec.model_validate({"train": source})
    return open_data(spec, tokenizer=None, model=ModelInterface("causal", 64, 67), base=tmp_path)


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 4), (2, 2)])
def test_accumulating_is_a_larger_batch(batch, accumulate, tiny_gpt2, tmp_path, monkeypatch):
    data, gradients = _ragged(tmp_path), []

    def capture(optimizer, *_):
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim.AdamW, "step", capture)
    for at, sizes in enumerate(({"batch": 4}, {"batch": batch, "accumulate": accumulate})):
        torch.manual_seed(0)
        model = tiny_gpt2(seed=0)
        objective = Objective(Side(model, family_of(model.config)), [CrossEntropy()])
        with set_dropout(model, 0.0):
            _run(objective, data, tmp_path / str(at), _config(steps=1, eval_every=None, clip=None, **sizes))
    for one, several in zip(*gradients, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_broke_are_never_a_checkpoint(steps, tiny_gpt2, data, tmp_path):
    objective = _objective(tiny_gpt2)
    with pytest.raises(DivergedError, match=r"(loss on data\.eval|loss|gradient norm) is .* at step 1"):
        _run(objective, data, tmp_path, _config(steps=steps, lr=1e38, warmup=0, eval_every=1))
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_what_is_handed_on_is_what_was_evaluated(tiny_gpt2, data, tmp_path):
    """With ``keep: last`` the metric is that of the last weights, though earlier ones were better."""
    objective = _objective(tiny_gpt2)
    trained = _run(objective, data, tmp_path, _config(lr=1.0, warmup=0, schedule="constant", keep="last"))
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    evaluations = [row["eval_nll"] for row in rows if "eval_nll" in row]
    assert evaluations[-1] > min(evaluations)
    assert trained.metrics == {"eval_nll": evaluations[-1]}
