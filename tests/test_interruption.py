"""A launch script killed in the middle of any of its stages loses the piece in hand and ends with the same result."""

import pytest
from launches import attack, brittleness, finished, found, lines, scans, started, wait_until, write_pairs

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSAFE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")


def check(command, tmp_path, *stages):
    """Kills a run in every one of `stages` (called with its folder), and sets its end against a run left alone."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    kept = {}
    for seen in stages:
        process = started([*command, f"--out={out}"])
        wait_until(lambda seen=seen: seen(out), process)
        process.kill()
        process.communicate()
        assert process.returncode == -9 and not (out / "run.json").exists()
        for log in out.glob("*.jsonl"):
            text = log.read_text().rpartition("\n")[0]
            assert text.startswith(kept.get(log.name, "")), f"a piece in {log.name} was made again"
            kept[log.name] = text
    finished(started([*command, f"--out={out}"]))
    assert all((out / name).read_text().startswith(text) for name, text in kept.items())
    finished(started([*command, f"--out={whole}"]))
    assert found(out) == found(whole)
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_scans_killed_while_it_generates(folder, tmp_path):
    check(scans(folder), tmp_path, lambda out: lines(out / "answers.jsonl") > 0)


def test_brittleness_killed_while_it_scores_and_while_it_sweeps(folder, tmp_path):
    command = brittleness(folder, write_pairs(tmp_path / "pairs.jsonl"))
    scored = "scores/snip_safety.safetensors"
    check(command, tmp_path, lambda out: (out / scored).is_file(), lambda out: lines(out / "points.jsonl") >= 2)


def test_attack_killed_while_it_trains_and_between_cells(folder, tmp_path):
    command = attack(folder, write_pairs(tmp_path / "pairs.jsonl"))
    trained = "checkpoints/*/3"
    check(command, tmp_path, lambda out: any(out.glob(trained)), lambda out: lines(out / "cells.jsonl") >= 2)
