from __future__ import annotations

import io

import pytest
from rich.console import Console

from compress.progress import Meter


def test_off_a_terminal_there_is_one_line_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("small", 10, 4, shown=True) as meter:
        meter.update(2.5, {"forward_kl": 2.0, "mask_l1": 0.5}, rate=1000.0)
        meter.update(2.0, {"forward_kl": 1.5, "mask_l1": 0.5}, rate=2000.0)
        meter.evaluated(1.25)
    out, told = capsys.readouterr()
    assert out == ""
    assert " ".join(told.split()) == "small 6/10 loss 2.0000 forward_kl 1.5 mask_l1 0.5 1,100 tok/s eval 1.2500"


def test_a_single_term_is_not_told_twice_and_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with Meter("small", 10, 0, shown=shown) as meter:
            meter.update(2.5, {"forward_kl": 2.5}, rate=1000.0)
            meter.evaluated(1.25)
        assert ("forward_kl" not in (told := capsys.readouterr().err)) and bool(told) == shown


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def terminal(**_: object) -> Console:
        return Console(file=screen, force_terminal=True, width=200)

    monkeypatch.setattr("compress.progress.Console", terminal)
    with Meter("small", 4, 1, shown=True) as meter:
        meter.update(2.5, {"forward_kl": 2.5}, rate=1000.0)
        meter.evaluated(1.25)
    drawn = screen.getvalue()
    assert "2/4" in drawn and "loss 2.5000" in drawn and "eval 1.2500" in drawn
