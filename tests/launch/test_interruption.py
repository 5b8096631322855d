"""A launch script stopped in the middle of any of its stages loses the piece in hand and ends with the same result."""

import re
import signal
import sys
import time

import pytest
from launches import brittleness, finished, found, lines, scans, short_attack, started, wait_until, write_pairs

from launch.interruption import SAID

ENDLESS = """
import jax
from launch import command

def main():
    print("started", flush=True)
    jax.lax.while_loop(lambda i: i >= 0, lambda i: (i + 1) % 5, 0).block_until_ready()

command.run(main)
"""
IDLE = ENDLESS.replace(
    "jax.lax.while_loop(lambda i: i >= 0, lambda i: (i + 1) % 5, 0).block_until_ready()", "while 1: 1"
)


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


@pytest.mark.slow
def test_scans_killed_while_it_generates(folder, tmp_path):
    logged = "store/answers-*.jsonl"
    check(scans(folder), tmp_path, lambda out: any(lines(log) > 0 for log in out.glob(logged)))


@pytest.mark.slow
def test_brittleness_killed_while_it_scores_and_while_it_sweeps(folder, tmp_path):
    command = brittleness(folder, write_pairs(tmp_path / "pairs.jsonl"))
    check(command, tmp_path, lambda out: some(out, "*snip*"), lambda out: some(out, "result-*.json", 2))


@pytest.mark.slow
def test_attack_killed_while_it_trains_and_between_cells(folder, tmp_path):
    command = short_attack(folder, write_pairs(tmp_path / "pairs.jsonl"))
    trained = "checkpoints/*/3"
    check(command, tmp_path, lambda out: any(out.glob(trained)), lambda out: some(out, "result-*.json", 2))


@pytest.fixture
def run():
    """Starts a script, which is over when the test is."""
    processes = []

    def start(script):
        processes.append(started([sys.executable, "-c", script]))
        assert processes[0].stdout.readline() == "started\n"
        return processes[0]

    yield start
    for process in processes:
        process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_ends_a_run_with_one_line(run, number, status):
    process = run(IDLE)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (status, f"{SAID}\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once_in_the_middle_of_a_program(run, number, status):
    process = run(ENDLESS)
    time.sleep(1.0)
    process.send_signal(number)
    assert process.stderr.readline() == f"{SAID}\n"
    time.sleep(1.0)
    assert process.poll() is None, "the program in hand was not waited for"
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (status, "")


@pytest.mark.parametrize("start", [["launch.plan"], ["launch.console", "plan"]])
def test_ctrl_c_before_the_run_begins_ends_with_one_line(start, tmp_path):
    # An import that the script meets on its way, and that takes its time.
    (tmp_path / "ml_collections.py").write_text("print('started', flush=True)\nimport time\ntime.sleep(60)\n")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n")
    process = started([sys.executable, "-m", *start], PYTHONPATH=str(tmp_path))
    try:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (130, "interrupted before the run began\n")


@pytest.mark.slow
def test_an_attack_interrupted_in_an_exam_saves_the_steps_before_it(folder, tmp_path):
    """SIGTERM in the midst of an exam of a training run ends it within a batch; no step is made again."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [
        *(
            flag
            for flag in short_attack(folder, write_pairs(tmp_path / "pairs.jsonl"))
            if "checkpoint_every" not in flag
        ),
        "--config.checkpoint_every=100",
        "--config.batch_size=1",
    ]
    process = started([*command, f"--out={out}"])
    # The first exam is that of the model before the attack; the next one is that of step 4.
    wait_until(lambda: some(out, "result-*.json") and any(lines(log) for log in out.glob("store/answers-*")), process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and error.splitlines()[-1] == SAID and "Traceback" not in error
    assert len(list(out.glob("store/result-*.json"))) == 1, "the exam in hand was not interrupted"
    assert [path.name for path in out.glob("checkpoints/*/*") if path.name.isdecimal()] == ["4"]
    losses = {path: path.stat().st_mtime_ns for path in out.glob("store/loss-*.json")}
    finished(started([*command, f"--out={out}"]))
    assert len(losses) == 1 and all(path.stat().st_mtime_ns == when for path, when in losses.items())
    finished(started([*command, f"--out={whole}"]))
    assert found(out) == found(whole)


@pytest.mark.slow
def test_scans_interrupted_while_it_calibrates_goes_on_from_its_batches(folder, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [*scans(folder), "--config.batch_size=2"]
    process = started([*command, f"--out={out}"])
    wait_until(lambda: any(lines(log) > 0 for log in out.glob("store/strength-*.jsonl")), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.splitlines()[-1] == SAID and "Traceback" not in error
    (log,) = out.glob("store/strength-*.jsonl")
    kept = lines(log)
    assert 0 < kept < 8
    ((_, said),) = finished(started([*command, f"--out={out}"]))
    assert re.search(r"layers and strength: (\d+)/\1 in", said)
    finished(started([*command, f"--out={whole}"]))
    assert found(out) == found(whole)
