"""What a stage of a run shows of itself in a log and on a terminal."""

import io
import time

import pytest
from rich.console import Console

from launch import command, stages
from launch.progress import Clock


@pytest.fixture
def shown(monkeypatch):
    """What is printed to a log."""
    text = io.StringIO()
    monkeypatch.setattr(command, "console", Console(file=text, width=80, force_terminal=False))
    return text


def test_a_log_has_a_line_at_the_start_now_and_then_and_at_the_end(shown, monkeypatch):
    monkeypatch.setattr(stages, "EVERY", 0.1)
    with stages.stage("scores", 40) as done:
        done(10)  # of an earlier run
        time.sleep(0.25)
        done(10)
        time.sleep(0.15)
    first, *between, last = shown.getvalue().splitlines()
    assert first == "scores: 0/40" and last == "scores: 40/40 in 0:00:00"
    assert len(between) >= 3 and between[0] == "scores: 10/40"
    # Twenty left at ten in a quarter of a second: what an earlier run made is no rate.
    rate = float(between[-1].removeprefix("scores: 20/40, ").split(" ")[0])
    assert 20 < rate <= 40 and between[-1].endswith(" a second, 0:00:01 left")


def test_a_line_is_due_at_least_every_half_minute():
    assert stages.EVERY <= 30


def test_pieces_that_are_not_counted_have_no_rate(shown, monkeypatch):
    monkeypatch.setattr(stages, "EVERY", 0.05)
    with stages.stage("loading", 0):
        time.sleep(0.12)
    lines = shown.getvalue().splitlines()
    assert lines[0] == "loading" and lines[1] == "loading: for 0:00:00" and lines[-1] == "loading: done in 0:00:00"


def test_a_stage_that_fails_does_not_say_that_it_is_finished(shown):
    with pytest.raises(KeyError), stages.stage("scores", 4):
        raise KeyError
    assert shown.getvalue() == "scores: 0/4\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(command, "console", Console(file=text, width=100, force_terminal=True))
    with stages.stage("scores", 4) as done:
        done(3)
    assert "━" in text.getvalue() and "4/4" in text.getvalue()


def test_of_stages_within_each_other_the_outermost_is_shown(shown):
    clock = Clock()
    with clock.watch("a_s")("outer", 2), clock.watch("b_s")("inner", 3) as done:
        done(3)
    assert "inner" not in shown.getvalue() and clock.seconds.keys() >= {"a_s", "b_s"}
