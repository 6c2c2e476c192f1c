"""Quantized exports that are no faster are reported, with reasons from the records; and the cost of each export."""

from dataclasses import replace

import pytest

from compress.measure.record import Percentiles, Record, Speed
from compress.report import build, numbers, sections, slow_exports, words
from compress.report.read import Manifest, Measurements, Run, RunFile, Stage, StageRun, Step
from tests.report.workdir import MB, write_run

VNNI = {"instructions": ["avx2", "avx512_vnni"], "cache_bytes": 32 * MB}


def export(
    name,
    *,
    token,
    prompt,
    size=500.0,
    bits=None,
    inputs="block",
    block=128,
    millions=100.0,
    ppl=50.0,
    head=None,
    table=None,
    read=None,
):
    """A record and the stage it is of; ``bits`` None is a float export.

    ``table``: bits and block of what rows are looked up in, else those of the product. ``read``: ms in which memory
    gives the files once.
    """
    record = Record(
        name=name,
        bytes=int(size * MB),
        parameters=int(millions * 1e6),
        quality={"perplexity": ppl},
        speed=Speed(
            per_token_ms=Percentiles(p50=token),
            prefill_ms=Percentiles(p50=prompt),
            weight_bytes_per_token=None if read is None else int(size * MB / 2),
            floor_ms=None if read is None else read / 2,
        ),
    )
    looked_up = dict(zip(("bits", "block"), table or (bits, block), strict=True))
    matrices = [
        {**looked_up, "activations": "none", "module": "tokens"},
        {"bits": bits, "block": block, "activations": inputs, "module": "product"},
    ]
    lineage = (Step(stage=name, type="export_onnx", config={"head": head} if head else {}),)
    traits = ("onnx",) if bits is None else ("quantized", "onnx")
    manifest = Manifest(traits=traits, quantization=None if bits is None else {"matrices": matrices}, lineage=lineage)
    return record, Stage(StageRun(name=name, type="export_onnx", path=name), manifest, (), {"tables": ["tokens"]})


def rows_of(*exports, environment=None):
    records, stages = zip(*exports, strict=True)
    file = RunFile(models={record.name: "" for record in records}, environment=environment or {})
    return numbers.rows_of([Run("run", file, Measurements(artifacts=records), stages)])


def sentences(*exports, environment=VNNI):
    rows = rows_of(*exports, environment=environment)
    found = words.warnings([rows[0].run], rows)
    assert all("\n" not in line and line.endswith(".") and "None" not in line for line in found)
    return found


BASE = export("base", token=10.0, prompt=80.0)


@pytest.mark.parametrize(
    ("token", "prompt", "where"),
    [
        (5.0, 40.0, []),
        (9.79, 78.3, []),
        (10.21, 40.0, ["per token"]),
        (5.0, 90.0, ["at a prompt"]),
        (11.0, 90.0, ["per token", "at a prompt"]),
    ],
)
def test_each_time_is_held_against_the_float_export(token, prompt, where):
    found = sentences(BASE, export("small", token=token, prompt=prompt, bits=4, size=60))
    assert [line.split(" no faster ")[1].split(" than base ")[0] for line in found] == where


def test_the_line_has_both_figures():
    (line,) = sentences(BASE, export("small", token=12.5, prompt=40.0, bits=4))
    assert line.startswith(
        "small is quantized but no faster per token than base (0.80x): 12.50 ms compared with 10.00 ms; "
        "the records do not explain"
    )


def test_a_float_export_is_not_held_to_be_faster():
    assert not sentences(BASE, export("again", token=12.0, prompt=99.0))


CACHED = {"size": 20.0}


@pytest.mark.parametrize(
    ("base", "small", "environment", "reason"),
    [
        ({}, {"block": 16}, VNNI, "block size 16 has no fast kernel; only 32, 64, 128 have one"),
        ({}, {"bits": 2, "inputs": "none"}, VNNI, "its 2-bit codes become float32 weights when it is opened"),
        ({}, {"inputs": "none"}, VNNI, "codes are converted to float32 numbers at each use"),
        ({}, {}, {"instructions": ["avx2"]}, "no dot products of 8-bit numbers"),
        ({}, {}, {"instructions": []}, "no dot products of 8-bit numbers"),
        (CACHED, {}, VNNI, "base fits into the processor's cache (20.00 of 32.00 MB)"),
        ({"millions": 2.0}, {"millions": 2.0}, {}, "a step spends its time on kernel calls"),
    ],
)
def test_reasons_come_from_what_was_recorded(base, small, environment, reason):
    """Each is there where the record says so, and not with another record."""
    slow = {"token": 12.0, "prompt": 40.0}
    (line,) = sentences(
        export("base", token=10.0, prompt=80.0, **base),
        export("small", **slow, **{"bits": 4, **small}),
        environment=environment,
    )
    assert reason in line
    (other,) = sentences(BASE, export("small", **slow, bits=4))
    assert reason not in other


@pytest.mark.parametrize(("token", "told_ratio"), [(9.81, "1.02x"), (10.0, "1.00x"), (10.19, "0.98x")])
def test_a_tie_is_reported_as_a_tie(token, told_ratio):
    """Neither faster nor slower: figures that differ by less than the stated tolerance are no verdict on a sign."""
    (line,) = sentences(BASE, export("small", token=token, prompt=40.0, bits=4))
    assert line.startswith(f"small is quantized but as fast per token as base, to within 2 % ({told_ratio}): ")
    assert "no faster" not in line


PROMPT = {"token": 5.0, "prompt": 90.0}


def test_a_prompt_has_no_reason_that_nothing_recorded_bears_out():
    for bits in (2, 4, 8):
        (line,) = sentences(BASE, export("small", **PROMPT, bits=bits, millions=2.0))
        assert line.endswith("90.00 ms compared with 80.00 ms; the records do not explain why.")


@pytest.mark.parametrize(("read", "little"), [(20.0, True), (40.0, True), (41.0, False), (80.0, False)])
def test_fewer_bytes_save_little_where_reading_them_takes_a_small_part(read, little):
    base = export("base", token=10.0, prompt=80.0, read=read)
    (line,) = sentences(base, export("small", **PROMPT, bits=4))
    said = f"reading all weights of base from memory takes {read:.2f} of its 80.00 ms, so fewer bytes save little"
    assert (said in line) == little


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"bits": 4, "prompt": 60.0}, True),
        ({"bits": 2, "prompt": 60.0}, False),  # the same codes
        ({"bits": 4, "prompt": 89.5}, False),  # a tie
        ({"bits": 4, "prompt": 60.0, "millions": 50.0}, False),  # another size
        ({"bits": 4, "prompt": 60.0, "inputs": "none"}, False),  # another arithmetic
        ({"bits": 2, "prompt": 60.0, "table": (8, 128)}, False),  # more bits where no product reads them
    ],
    ids=str,
)
def test_codes_of_more_bits_are_named_where_they_are_faster(other, said):
    line, *_ = sentences(BASE, export("small", **PROMPT, bits=2), export("other", token=4.0, **other))
    assert ("products of 4-bit codes are faster there (other: 60.00 ms)" in line) == said
    assert said or "less time" not in line


@pytest.mark.parametrize(
    ("table", "product", "blamed"),
    [
        ((8, 128), {"bits": 4, "inputs": "none"}, "become float32 weights"),
        ((4, 16), {"bits": 4}, "no fast kernel"),
        ((2, 128), {"bits": 8}, "2-bit"),
    ],
)
def test_what_is_only_looked_up_slows_no_product(table, product, blamed):
    slow = {"token": 12.0, "prompt": 90.0}
    lines = sentences(BASE, export("small", **slow, **product, table=table))
    assert len(lines) == 2
    assert not any(blamed in line for line in lines)
    own = dict(zip(("bits", "block"), table, strict=True))
    if blamed != "2-bit":
        assert all(blamed in line for line in sentences(BASE, export("small", **slow, **{**product, **own})))


def test_products_of_which_some_became_floats_have_both_reasons():
    record, stage = export("small", token=12.0, prompt=40.0, bits=4, inputs="none")
    head = {"bits": 8, "block": 128, "activations": "none", "module": "head"}
    manifest = stage.manifest.model_copy(
        update={"quantization": {"matrices": [*stage.manifest.quantization["matrices"], head]}}
    )
    (line,) = sentences(BASE, (record, replace(stage, manifest=manifest)))
    assert "its 8-bit codes become float32 weights" in line and "codes are converted to float32 numbers" in line


def test_codes_that_became_floats_have_one_reason():
    """Neither the cache nor unpacking matter to products of float32 weights."""
    slow = {"token": 12.0, "prompt": 90.0, "millions": 2.0}
    lines = sentences(export("base", token=10.0, prompt=80.0, size=20), export("small", **slow, bits=8, inputs="none"))
    assert len(lines) == 2
    assert all(line.count(";") == 1 and "its 8-bit codes become float32 weights" in line for line in lines)


def test_costs_are_against_the_first_float_export():
    rows = rows_of(
        export("cut", token=8.0, prompt=60.0, size=400, ppl=40.0),
        export("w2", token=2.0, prompt=30.0, size=40, bits=2, ppl=42.0, head="split"),
        export("w4", token=4.0, prompt=120.0, size=80, bits=4, inputs="none", ppl=40.0),
    )
    table = sections.exports(rows)
    assert table.titles == [
        *[
            ("artifact", ""),
            ("form", ""),
            ("size", "MB"),
            ("smaller", ""),
            ("per token", "ms"),
            ("faster", "per token"),
        ],
        *[("prefill", "ms"), ("faster", "prefill"), ("perplexity", ""), ("change", "of perplexity")],
    ]
    assert table.lines == [
        ["cut", "float32", "400.0", "–", "8.00", "–", "60.00", "–", "40.00", "–"],
        ["w2", "W2A8, split head", "40.00", "10.0x", "2.00", "4.0x", "30.00", "2.0x", "42.00", "+5.0 %"],
        ["w4", "W4A32", "80.00", "5.0x", "4.00", "2.0x", "120.0", "0.50x", "40.00", "+0.0 %"],
    ]


def test_costs_need_a_float_and_a_quantized_export_with_times():
    small = export("small", token=5.0, prompt=40.0, bits=4)
    untimed = replace_speed(small)
    for exports in ([BASE], [small], [BASE, untimed], [replace_speed(BASE), small]):
        assert sections.exports(rows_of(*exports)).lines == []
    assert len(sections.exports(rows_of(BASE, small, replace_speed(BASE, "other"))).lines) == 2


def replace_speed(found, name=None):
    record, stage = found
    name = name or record.name
    entry = stage.entry.model_copy(update={"name": name})
    return record.model_copy(update={"speed": Speed(), "name": name}), replace(stage, entry=entry)


@pytest.mark.slow
def test_a_report_has_the_table(tmp_path):
    workdir = write_run(tmp_path / "run")
    build([workdir], tmp_path)
    markdown, page = ((tmp_path / f"report.{suffix}").read_text() for suffix in ("md", "html"))
    assert "| small-onnx | W2A8 | 18.20 | 26.1x | 0.71 | 16.5x | 33.20 | 2.5x | 58.02 | +5.7 % | 221.9 |" in markdown
    assert page.count("What each export costs") == markdown.count("What each export costs") == 1
    build([write_run(tmp_path / "unmeasured", measure=frozenset({"size"}))], tmp_path)
    assert "What each export costs" not in (tmp_path / "report.md").read_text()


def test_a_work_directory_says_which_exports_are_slow(tmp_path):
    workdir = write_run(tmp_path / "run")
    assert slow_exports(workdir) == []
    path = workdir / "measurements.json"
    path.write_text(path.read_text().replace('"per_token_ms": {"p50": 0.71', '"per_token_ms": {"p50": 12.71'))
    (line,) = slow_exports(workdir)
    assert line.startswith(
        "small-onnx is quantized but no faster per token than base-onnx (0.92x): 12.71 ms compared with"
    )
