from __future__ import annotations

import io

import pytest
from rich.console import Console

from compress.training.progress import Meter, duration


def test_off_a_terminal_there_is_one_line_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("small", 10, 4, shown=True) as meter:
        meter.update(2.5, {"forward_kl": 2.0, "mask_l1": 0.5}, rate=1000.0)
        meter.update(2.0, {"forward_kl": 1.5, "mask_l1": 0.5}, rate=2000.0)
        meter.evaluated(1.25)
    out, printed = capsys.readouterr()
    assert out == ""
    assert " ".join(printed.split()) == "small 6/10 loss 2.0000 eval 1.2500 1,100 tok/s"


def test_a_line_stays_one_line_however_narrow_the_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    with Meter("a-name-of-a-stage-that-is-long", 10_000, 0, shown=True) as meter:
        meter.update(2.5, {"forward_kl": 2.5}, rate=1000.0)
        meter.evaluated(1.25)
    assert capsys.readouterr().err.count("\n") == 1


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with Meter("small", 10, 0, shown=shown) as meter:
            meter.update(2.5, {"forward_kl": 2.5}, rate=1000.0)
            meter.evaluated(1.25)
        assert bool(capsys.readouterr().err) == shown


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def terminal(**_: object) -> Console:
        return Console(file=screen, force_terminal=True, width=200)

    monkeypatch.setattr("compress.training.progress.Console", terminal)
    with Meter("small", 4, 1, shown=True) as meter:
        meter.update(2.5, {"forward_kl": 2.5}, rate=1000.0)
        meter.evaluated(1.25)
        assert "forward_kl" not in meter.terms  # a single term is the loss
        meter.update(2.5, {"forward_kl": 2.0, "mask_l1": 0.5}, rate=1000.0)
    drawn = screen.getvalue()
    assert "3/4" in drawn and "loss 2.5000  forward_kl 2  mask_l1 0.5  eval 1.2500" in drawn


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (59.97, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
