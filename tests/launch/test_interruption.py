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
        for log in out.glob("store/answers-*.jsonl"):
            text = log.read_text().rpartition("\n")[0]
            assert text.startswith(kept.get(log, "")), f"a piece in {log.name} was made again"
            kept[log] = text
        for piece in finished_pieces(out):
            assert kept.setdefault(piece, piece.stat().st_mtime_ns) == piece.stat().st_mtime_ns, "made again"
    finished(started([*command, f"--out={out}"]))
    assert all(piece.stat().st_mtime_ns == kept.get(piece, piece.stat().st_mtime_ns) for piece in finished_pieces(out))
    finished(started([*command, f"--out={whole}"]))
    assert found(out) == found(whole)
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def finished_pieces(out):
    return [*out.glob("store/*.json"), *out.glob("store/directions-*"), *out.glob("store/reading-*")]


def some(out, pattern, n=1):
    return len(list(out.glob(f"store/{pattern}"))) >= n


def test_scans_killed_while_it_generates(folder, tmp_path):
    logged = "store/answers-*.jsonl"
    check(scans(folder), tmp_path, lambda out: any(lines(log) > 0 for log in out.glob(logged)))


def test_brittleness_killed_while_it_scores_and_while_it_sweeps(folder, tmp_path):
    command = brittleness(folder, write_pairs(tmp_path / "pairs.jsonl"))
    check(command, tmp_path, lambda out: some(out, "*snip*"), lambda out: some(out, "result-*.json", 2))


def test_attack_killed_while_it_trains_and_between_cells(folder, tmp_path):
    command = attack(folder, write_pairs(tmp_path / "pairs.jsonl"))
    trained = "checkpoints/*/3"
    check(command, tmp_path, lambda out: any(out.glob(trained)), lambda out: some(out, "result-*.json", 2))
