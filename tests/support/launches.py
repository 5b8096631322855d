"""Launch scripts on the tiny model, as processes of their own: their flags, and what of their results must agree."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
# Of run.json: how long it took, when, and where.
OF_THE_RUN = {"timings", "environment"}


def scans(folder):
    """The command of a short `launch.scans`, without --out."""
    return script(
        "scans",
        model=folder,
        batch_size=8,
        max_new_tokens=4,
        calibration_tokens=3,
        passages=2,
        anchors=("builtin:harmful/anchor#4", "builtin:plain/anchor#4"),
        calibration=("builtin:harmful/calibration#4", "builtin:plain/calibration#4"),
        evaluation=("builtin:lookalike/test#6", "builtin:harmful/test#6"),
        kl_limit=100.0,
    )


def examined(folder, pairs):
    """What the two experiments on weights share."""
    return {
        "model": folder,
        "safety_pairs": pairs,
        "utility_pairs": pairs,
        "evaluation": ("builtin:harmful/test#5",),
        "harmless": ("builtin:plain/test#3",),
        "batch_size": 8,
        "max_new_tokens": 4,
        "passages": 2,
    }


def brittleness(folder, pairs):
    """The command of a short `launch.brittleness` on the file `pairs`, without --out."""
    return script(
        "brittleness",
        **examined(folder, pairs),
        samples=24,
        score_batch_size=1,
        set_difference=((0.3, 0.1),),
        orthogonal=((8, 8),),
        controls=1,
    )


def attack(folder, pairs):
    """The command of a short `launch.attack` on the file `pairs`, without --out."""
    return script(
        "attack",
        **examined(folder, pairs),
        freeze_weights=((0.3, 0.1),),
        freeze_ranks=(),
        attacks=("identity_shift#6",),
        epochs=4,
        learning_rate=3e-3,
        tuning_batch_size=3,
        seeds=(0,),
        evaluate_every=4,
        checkpoint_every=1,
    )


def short_attack(folder, pairs):
    """The same without random controls and rewinds: an attack, and one defence."""
    return [*attack(folder, pairs), "--config.controls=False", "--config.rewinds=False"]


def script(name, **changes):
    """The command of the launch script `name` with its smallest configuration changed."""
    values = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in changes.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [sys.executable, "-m", f"launch.{name}", f"--config=configs/{name}/smollm2_135m.py", *flags]


def write_pairs(path):
    """Prompts with answers to score."""
    asked = [{"prompt": f"how do i bake bread number {i}?", "response": " i will not, friend."} for i in range(24)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in asked))
    return path


def started(command, **environment):
    """The running process of `command`."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    variables = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | environment
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=variables, **streams)


def finished(*processes, timeout=280):
    """What each process printed, standard output and error. Fails where one ended badly."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(error for _, error in said)
    return said


def wait_until(seen, *processes, timeout=240):
    """Returns when `seen()` holds. Fails where a process ends before."""
    end = time.monotonic() + timeout
    while not seen():
        assert all(p.poll() is None for p in processes), "it ended before: " + processes[0].communicate()[1]
        assert time.monotonic() < end, "it was never seen"
        time.sleep(0.01)


def lines(path):
    """How many whole lines a file has; none where it is absent."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def found(out):
    """What a run found, without what differs between two runs of the same."""
    record = json.loads((out / "run.json").read_text())
    return {key: value for key, value in record.items() if key not in OF_THE_RUN}


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
