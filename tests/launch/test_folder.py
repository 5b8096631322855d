"""The folder of a run: what it may hold, whose it is, one run at a time, and what a run that goes on says and adds."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from launches import ROOT, finished, scans, started, wait_until
from runs import RUNS, save

from configs.fields import Count, Field, config_of
from launch import folder
from launch.folder import EXPERIMENT, LOCK, WRITTEN, Identity
from launch.progress import Clock, use_line

MINE = Identity("scans", {"model": "a", "alpha": 1.0})
HOLDER = """
import sys
from launch import folder
from launch.folder import Identity
folder.OVERWRITE = type("Flag", (), {"value": False})
with folder.held(sys.argv[1], Identity("scans", {"model": "a"})):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def overwrite(monkeypatch):
    flag = SimpleNamespace(value=False)
    monkeypatch.setattr(folder, "OVERWRITE", flag)
    return flag


def run(out, mine=MINE, *names):
    """A run that writes files of these names."""
    with folder.held(out, mine) as own:
        for name in names:
            (own / name).parent.mkdir(exist_ok=True)
            (own / name).write_text("{}\n")


def refusal(out, mine=MINE):
    with pytest.raises(ValueError) as error:
        run(out, mine, "run.json")
    line = str(error.value)
    assert line.startswith(f"--out={out}") and "\n" not in line
    return line.removeprefix(f"--out={out} ")


def test_a_folder_is_made_and_kept_where_something_was_finished(tmp_path):
    run(tmp_path / "a/b", MINE, "store/result-1.json")
    kept = json.loads((tmp_path / "a/b" / EXPERIMENT).read_text())
    assert kept["identity"] == {"task": "scans", "config": {"model": "a", "alpha": 1.0}} and kept["pid"] == os.getpid()


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_finishes_nothing_leaves_nothing(tmp_path, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(KeyError), folder.held(out, MINE):
        raise KeyError
    assert out.exists() is there and not (there and list(out.iterdir()))
    run(out, Identity("attack", {}), "run.json")  # and is no experiment that stands in the way


def test_what_is_no_run_is_left_alone(tmp_path, overwrite):
    (tmp_path / "figures").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite.value in (False, True):
        assert refusal(tmp_path) == "holds 'figures', which is of no jaxsafe run; give another folder"
    assert {entry.name for entry in tmp_path.iterdir()} == {"figures", "notes.txt"}


def test_a_file_and_a_place_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file") == "is a file; give a folder"
    assert refusal(tmp_path / "file" / "below").startswith("cannot be written (Not a directory)")
    assert refusal(tmp_path / ("x" * 300)).startswith("cannot be written (File name too long)")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3e6))
    assert refusal(tmp_path / "full") == "has 3 MB of disk left; a run needs 100 MB or more"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    assert refusal(tmp_path / "x").startswith("cannot be written (Permission denied)")


def test_another_experiment_is_refused_by_what_differs(tmp_path):
    run(tmp_path, MINE, "run.json", "store/result-1.json")
    run(tmp_path, MINE)  # the same goes on
    other = Identity("scans", {"model": "a", "alpha": 2.5, "layers": [1, 2]})
    said = "holds another experiment (config.alpha 1.0 -> 2.5, config.layers nothing -> [1,2]); "
    assert refusal(tmp_path, other) == said + "give another folder or --overwrite"
    assert "(scans of a, not attack of b)" in refusal(tmp_path, Identity("attack", {"model": "b"}))
    many = Identity("scans", {"model": "b" * 200, **dict.fromkeys("vwxyz", 1)})
    assert re.search(r'config.model "a" -> "b{76}\.\.\., .* and 3 more\)', refusal(tmp_path, many))
    assert (tmp_path / "run.json").exists() and (tmp_path / "store/result-1.json").exists()


def test_what_an_older_experiment_does_not_name_was_off_there():
    newer = MINE.config | {"more": [], "share": 0.0}
    assert folder.differences(MINE, Identity("scans", newer)) == ""
    assert folder.differences(MINE, Identity("scans", newer | {"share": 0.1})) == "config.share nothing -> 0.1"
    assert folder.differences(Identity("scans", newer), MINE).startswith("config.more [] -> nothing")


def test_a_run_without_settings_is_replaced_only_if_asked(tmp_path, overwrite):
    save(tmp_path, RUNS["scans"](), [])
    assert refusal(tmp_path).startswith("holds a run that does not say its settings")
    overwrite.value = True
    run(tmp_path, MINE, "samples.jsonl")
    assert not (tmp_path / "run.json").exists()


def test_a_file_named_like_one_of_a_run_is_left_alone(tmp_path, overwrite):
    overwrite.value = True
    (tmp_path / "run.json").write_text('{"lap": 1}')
    assert refusal(tmp_path).startswith("holds 'run.json', which is of no jaxsafe run")
    assert (tmp_path / "run.json").read_text() == '{"lap": 1}' and not (tmp_path / LOCK).exists()


def test_overwrite_takes_away_what_runs_write_and_nothing_else(tmp_path, overwrite):
    run(tmp_path, MINE, *(f"{name}/x" if "." not in name else name for name in WRITTEN if name != EXPERIMENT))
    (tmp_path / "notes.txt").write_text("mine")
    overwrite.value = True
    other = Identity("scans", {"model": "b"})
    run(tmp_path, other, "samples.jsonl")
    assert {entry.name for entry in tmp_path.iterdir()} - {LOCK} == {"samples.jsonl", "notes.txt", EXPERIMENT}
    assert folder.read(tmp_path).identity == other


def test_settings_that_tell_no_experiment_from_another_may_change():
    fields = {"model": Field("a", str, "m"), "batch_size": Field(3, Count, "b", identifies=False)}
    assert folder.identity("scans", fields, config_of(fields), data="x") == Identity(
        "scans", {"model": "a", "data": "x"}
    )


@contextlib.contextmanager
def holder(out):
    """Another process that holds `out`."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_run_says_who_holds_the_folder_and_a_killed_one_holds_nothing(tmp_path):
    with holder(tmp_path / "out") as process:
        said = refusal(tmp_path / "out")
        assert re.match(rf"is written to by process {process.pid} on \S+ since 20\d\d-\S+; give another folder", said)
        process.send_signal(signal.SIGKILL)
        process.wait()
        run(tmp_path / "out", MINE, "run.json")
    assert folder.read(tmp_path / "out").pid == os.getpid()


def test_a_run_that_goes_on_says_what_is_finished(tmp_path, capsys):
    run(tmp_path, MINE, "store/result-1.json", "store/result-2.json", "store/directions-3.safetensors")
    (tmp_path / "store/answers-4.jsonl").write_text("1\n2\n3\n")
    run(tmp_path)
    said = "1 directions, 2 results, 3 answers of an unfinished exam are finished and kept"
    assert " ".join(capsys.readouterr().err.split()) == f"goes on in {tmp_path}: {said}"
    assert folder.pieces(tmp_path, 30).startswith("1 directions, 2 of 30 results, 3 answers")


def test_seconds_of_an_interrupted_run_are_added(tmp_path):
    (tmp_path / "store").mkdir()
    first, second = Clock(), Clock()
    first.resume(tmp_path)
    with pytest.raises(KeyboardInterrupt), first.stage("exam_s"):
        raise KeyboardInterrupt
    kept = json.loads((tmp_path / "store/seconds").read_text())
    assert kept.keys() == {"exam_s"}
    (tmp_path / "store/seconds").write_text(json.dumps({"exam_s": 100.0, "load_s": 7.0}))
    second.resume(tmp_path)
    with second.stage("exam_s"):
        pass
    timings = second.record(None, 1)
    assert 100 < timings["exam_s"] < 101 and timings["load_s"] == 7
    assert timings.pop("use") == {} and timings.pop("resumed")
    assert json.loads((tmp_path / "store/seconds").read_text()) == timings
    assert (
        use_line({"use": {"exam_s": {"tokens_per_s": 3}}, "resumed": True}) == "since the run went on: exam 3 tokens/s"
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_and_another_experiment_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSAFE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    out = tmp_path / "out"
    command = [*scans(folder), f"--out={out}"]
    first = started(command)
    wait_until(lambda: list(out.glob("store/reading-*")) and (out / "store/seconds").exists(), first)
    second = started(command)
    _, said = second.communicate(timeout=100)
    assert second.returncode == 2 and f"is written to by process {first.pid} on " in said
    first.kill()
    first.communicate()
    seconds = json.loads((out / "store/seconds").read_text())
    ((_, said),) = finished(started([*command, "--config.batch_size=7"]))
    assert "1 directions, 1 reading" in " ".join(said.split())
    run = json.loads((out / "run.json").read_text())
    assert all(run["timings"][name] >= took for name, took in seconds.items())
    assert "launch.scans" in run["environment"]["command"] and "--config.batch_size=7" in run["environment"]["command"]
    assert run["environment"]["versions"].keys() == {"jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy"}
    other = started([*command, "--config.max_new_tokens=5"])
    _, said = other.communicate(timeout=100)
    assert other.returncode == 2 and "(config.max_new_tokens 4 -> 5)" in said.splitlines()[-1]
