"""References, ratios, the trade-off front, and the sentences made of them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.measure.record import Percentiles, Record, Speed
from compress.report import numbers, plots, sections, words
from compress.report.examples import examples
from compress.report.read import Manifest, Measurements, Run, RunFile, Stage, StageRun, Step

POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1)


def run_of(*artifacts):
    """A run of (name, traits, MB, perplexity, ms per token[, quantization[, millions of parameters]]).

    None is not measured.
    """
    records, stages = [], []
    for name, traits, size, perplexity, token, *extra in artifacts:
        records.append(
            Record(
                name=name,
                bytes=None if size is None else int(size * numbers.MB),
                compression_ratio=None if size is None else 400 / size,
                quality={} if perplexity is None else {"perplexity": perplexity},
                speed=Speed() if token is None else Speed(per_token_ms=Percentiles(p50=token)),
                parameters=int((extra[1] if len(extra) > 1 else 100) * 1e6),
            )
        )
        manifest = Manifest(traits=traits, quantization=extra[0] if extra else None)
        stages.append(Stage(StageRun(name=name, type="x", path=name), manifest, (), {}))
    models = {record.name: record.path for record in records}
    return Run("run", RunFile(models=models), Measurements(artifacts=tuple(records)), tuple(stages))


def headline(*artifacts):
    return words.headline(numbers.rows_of([run_of(*artifacts)]))


def test_speed_is_compared_within_one_runtime():
    rows = numbers.rows_of(
        [
            run_of(
                ("base", (), 400, 50.0, 30.0),
                ("base-onnx", ("onnx",), 400, 50.0, 12.0),
                ("small", ("pruned",), 40, 51.0, 15.0),
                ("small-onnx", ("pruned", "onnx"), 40, 51.0, 3.0),
            )
        ]
    )
    assert [numbers.speedup(rows, row) for row in rows] == [None, None, 2.0, 4.0]


def test_speed_falls_back_to_the_other_runtime():
    rows = numbers.rows_of([run_of(("base", (), 400, 50.0, 30.0), ("small-onnx", ("pruned", "onnx"), 40, 51.0, 3.0))])
    assert numbers.speedup(rows, rows[1]) == 10.0


def test_change_is_against_the_first_uncompressed_artifact():
    rows = numbers.rows_of([run_of(("base", (), 400, 50.0, None), ("small", ("quantized",), 40, 55.0, None))])
    assert numbers.change(rows, rows[0], "perplexity") is None
    assert numbers.change(rows, rows[1], "perplexity") == pytest.approx(0.1)


@pytest.mark.slow
@given(POINTS, st.booleans())
def test_front_is_what_no_point_beats(points, lower):
    sign = 1 if lower else -1
    best = numbers.front(points, lower_is_better=lower)

    def beaten(point):
        return any(
            (x, sign * y) != (point[0], sign * point[1]) and x <= point[0] and sign * y <= sign * point[1]
            for x, y in points
        )

    assert set(best) == {point for point in points if not beaten(point)}
    assert best == sorted(best)


def test_a_metric_measured_in_two_ways_is_two_columns():
    quality = {
        "bleu": 3.5, "perplexity": 50.0, "tokens": 900, "perplexity (split eval)": 60.0, "tokens (split eval)": 700,
        "samples": [{"input": "a", "output": "b"}], "samples (beams 4)": [{"input": "a", "output": "c"}],
    }  # fmt: skip
    run = Run("run", RunFile(models={"base": ""}), Measurements(artifacts=(Record(name="base", quality=quality),)), ())
    rows = numbers.rows_of([run])
    assert list(rows[0].quality) == ["perplexity", "perplexity (split eval)", "bleu"]
    table = sections.measured(rows)
    assert table.titles[1:] == [("perplexity", ""), ("perplexity", "split eval"), ("BLEU", "")]
    assert table.lines[0][1:] == ["50.00", "60.00", "3.50"]
    assert sections.conditions(rows) == [("quality.tokens", "900"), ("quality.tokens (split eval)", "700")]
    assert [one.lines for one in examples(rows)] == [[("input", "a"), ("base", "b"), ("base (beams 4)", "c")]]
    assert words.name_of("rougeL (beams 4)") == "ROUGE-L (beams 4)"


def test_runs_on_different_splits_share_no_column():
    def run(name, ways):
        quality = {f"perplexity{way}": value for way, (value, _) in ways.items()}
        conditions = {f"quality{way}": {"split": on} for way, (_, on) in ways.items()}
        record = Record(name="base", quality=quality, conditions={**conditions, "speed": {"device": "cpu"}})
        return Run(name, RunFile(models={"base": ""}), Measurements(artifacts=(record,)), ())

    first = run("one", {"": (5.0, "data.test"), " (batch 2)": (5.5, "data.test")})
    second = run("two", {"": (6.0, "data.eval"), " (batch 2)": (6.5, "data.eval")})
    third = run("three", {"": (7.0, "data.test"), " (split eval)": (7.5, "data.eval")})
    rows = numbers.rows_of([first, second, third])
    assert [row.quality for row in rows] == [
        {"perplexity": 5.0, "perplexity (batch 2)": 5.5},
        {"perplexity (split eval)": 6.0, "perplexity (split eval, batch 2)": 6.5},
        {"perplexity": 7.0, "perplexity (split eval)": 7.5},
    ]
    assert list(rows[1].record.conditions) == ["quality (split eval)", "quality (split eval, batch 2)", "speed"]
    assert numbers.rows_of([second])[0].record == second.records[0]


def test_headline_says_slower_when_it_is():
    sentence = headline(("base", (), 400, 50.0, 10.0), ("small", ("quantized",), 40, 49.0, 20.0))
    assert "2.0x slower per token than base" in sentence
    assert "(-2.0 %)" in sentence


@pytest.mark.parametrize(
    ("artifacts", "part"),
    [
        ([("base", (), 400, 50.0, None)], "No stage of this run made a smaller model"),
        ([], "No stage of this run made a smaller model"),
        ([("base", (), None, 50.0, None), ("s", ("pruned",), None, 51.0, None)], "s is compressed, but no size was"),
        ([("base", (), 400, None, None), ("s", ("pruned",), 40, None, None)], "its quality was not measured"),
        ([("s", ("pruned",), 40, 51.0, None)], "with no uncompressed model to compare with"),
    ],
)
def test_headline_without_all_the_numbers(artifacts, part):
    assert part in headline(*artifacts)


def test_a_student_of_a_smaller_shape_is_compressed():
    run = run_of(("big", (), 400, 50.0, None), ("student", (), 40, 60.0, None, None, 10))
    made = replace(run.stages[1], manifest=Manifest(lineage=(Step(stage="student", type="distill"),)))
    run = replace(run, stages=(run.stages[0], made))
    assert words.headline(numbers.rows_of([run])).startswith("student is 10.0x smaller than big")
    assert numbers.change(numbers.rows_of([run]), numbers.rows_of([run])[1], "perplexity") == pytest.approx(0.2)


def test_headline_speaks_of_the_smallest_artifact_that_was_fully_measured():
    sentence = headline(
        ("base", (), 400, 50.0, 10.0),
        ("mid", ("pruned",), 200, 51.0, 5.0),
        ("tiny", ("pruned",), 20, None, None),
        ("small", ("pruned",), 40, 55.0, 2.0),
    )
    assert sentence.startswith("small is 10.0x smaller")


@pytest.mark.parametrize(
    ("block", "token", "part"),
    [(16, 12.0, "block size 16 has no fast kernel"), (128, 12.0, "the records do not explain"), (128, 2.0, None)],
)
def test_a_quantized_export_that_is_not_faster_is_warned_of(block, token, part):
    run = run_of(
        ("base", ("onnx",), 400, 50.0, 10.0),
        ("small", ("quantized", "onnx"), 40, 51.0, token, {"matrices": [{"block": block}]}),
    )
    found = words.warnings([run], numbers.rows_of([run]))
    assert (len(found) == 1 and part in found[0]) if part else found == []


def test_a_quantized_export_is_held_against_the_float_export_of_its_size():
    quantization = {"matrices": [{"block": 128}]}
    run = run_of(
        ("base", ("onnx",), 400, 50.0, 10.0),
        ("cut", ("pruned", "onnx"), 200, 51.0, 4.0, None, 50),
        ("small", ("pruned", "quantized", "onnx"), 20, 52.0, 5.0, quantization, 50),
    )
    (found,) = words.warnings([run], numbers.rows_of([run]))
    assert "small is quantized but no faster per token than cut (0.80x)" in found


def test_a_change_of_runtime_is_reported():
    run = run_of(("base", (), 400, 50.0, 30.0), ("small", ("pruned", "onnx"), 40, 51.0, 3.0))
    (found,) = words.warnings([run], numbers.rows_of([run]))
    assert found.startswith("small ran in ONNX Runtime and base in torch")
    assert "10.0x faster per token than base in torch on this CPU" in words.headline(numbers.rows_of([run]))


def test_emulated_times_are_reported_and_not_the_headline():
    quantization = {"matrices": [{"block": 128}]}
    run = run_of(
        ("base", (), 400, 50.0, 10.0),
        ("base-onnx", ("onnx",), 401, 50.0, 10.0),
        ("small", ("quantized",), 20, 51.0, 40.0, quantization),
        ("small-onnx", ("quantized", "onnx"), 21, 51.0, 2.0, quantization),
    )
    rows = numbers.rows_of([run])
    assert words.headline(rows).startswith("small-onnx is ")
    assert numbers.speedup(rows, rows[2]) is None
    (found,) = words.warnings([run], rows)
    assert (
        found == "The times of small were measured with quantization emulated in float32; measure an export for speed."
    )


@pytest.mark.parametrize(
    ("kept", "part"),
    [
        ({"layer.0.heads": [0], "layer.1.heads": [0, 1]}, "different sizes in different layers"),
        ({"encoder.layer.0.heads": [0], "decoder.layer.0.heads": [0, 1]}, "unequal encoder and decoder heads"),
        ({"hidden": [0, 1], "layer.0.heads": [0], "layer.1.heads": [1]}, None),
    ],
)
def test_a_shape_that_stock_classes_or_runtimes_refuse_is_warned_of(kept, part):
    stage = Stage(StageRun(name="pruned", type="prune", path="p"), Manifest(kept=kept), (), {})
    found = words.warnings([Run("run", RunFile(), Measurements(), (stage,))], [])
    assert (len(found) == 1 and part in found[0]) if part else found == []


def test_counts_that_a_stage_recorded_are_whole():
    found = {"rows": 120.0, "on_policy_steps": 4.0, "tokens": 12_345.0, "eval_nll": 4.05, "share": 0.25}
    step = Step(stage="kd", type="seq_kd", metrics=found)
    stage = Stage(StageRun(name="kd", type="seq_kd", path="kd"), Manifest(lineage=(step,)), (), {})
    (line,) = sections.stages([Run("run", RunFile(), Measurements(), (stage,))]).lines
    assert line[-1] == "rows 120, on policy steps 4, tokens 12,345, eval nll 4.05, share 0.25"


def two(quality, figures=None):
    """Rows of a whole model and one of half its size, each with these figures; those of the second are ten higher."""
    records = tuple(
        Record(
            name=name, bytes=size * numbers.MB, compression_ratio=4 / size, figures=figures or {},
            quality={key: value + more for key, value in quality.items()},
        )
        for name, size, more in (("base", 4, 0.0), ("small", 2, 10.0))
    )  # fmt: skip
    stage = Stage(StageRun(name="small", type="x", path="small"), Manifest(traits=("pruned",)), (), {})
    models = {record.name: "" for record in records}
    return numbers.rows_of([Run("run", RunFile(models=models), Measurements(artifacts=records), (stage,))])


@pytest.mark.parametrize(
    ("quality", "figures", "axis"),
    [
        ({"perplexity": 50.0}, None, "perplexity (less is better)"),
        ({"bleu": 50.0}, None, "BLEU (more is better)"),
        ({"words_mean": 5.0}, None, "mean words"),
        ({"mine": 5.0}, None, "mine"),
        ({"mine": 5.0}, {"mine": {"label": "my own", "better": "lower"}}, "my own (less is better)"),
        ({"mine": 5.0}, {"mine": {"label": "my own", "better": "higher"}}, "my own (more is better)"),
    ],
)
def test_the_plot_says_the_declared_direction(quality, figures, axis):
    svg = plots.size_against_quality(two(quality, figures))
    assert f">{axis}<" in svg


def test_a_recorded_label_is_in_every_sentence_and_table():
    rows = two({"mine": 50.0}, {"mine": {"label": "my own", "order": 1}})
    assert words.headline(rows).endswith("; my own 50.00 → 60.00 (+20.0 %).")
    assert ("+20.0 %", "my own") in sections.tiles(rows)
    assert sections.measured(rows).titles[3:] == [("my own", ""), ("change", "of my own")]


def test_figures_that_are_told_apart_by_their_split_keep_what_is_declared():
    figures = {"mine (split eval)": {"label": "my own", "better": "lower"}}
    record = Record(name="base", quality={"mine (split eval)": 1.0}, figures=figures)
    row = numbers.rows_of([Run("run", RunFile(models={"base": ""}), Measurements(artifacts=(record,)), ())])[0]
    assert sections.measured([row]).titles[1:] == [("my own", "split eval")]
