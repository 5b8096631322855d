"""Two processes of four devices each give what one process of eight gives, and one of them writes it."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from processes import numbers

from jaxsafe.io.hf import SafetensorsFolder
from jaxsafe.parallel import parse_mesh

HERE = pathlib.Path(__file__).parent


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def both(commands, environment, timeout=280):
    """Runs the commands at once; their standard outputs. Fails with what they complained of."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    variables = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | environment
    options = {"env": variables, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": HERE.parent}
    workers = [subprocess.Popen(command, **options) for command in commands]
    try:
        said = [worker.communicate(timeout=timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(error for _, error in said)
    return said


@pytest.mark.slow
def test_kernels_give_the_numbers_of_one_process(folder, tmp_path):
    port, out = free_port(), tmp_path / "two"
    out.mkdir()
    command = [sys.executable, str(HERE / "processes.py")]
    both([[*command, str(i), str(port), str(folder), str(out)] for i in range(2)], {})
    (tmp_path / "one" / "process0").mkdir(parents=True)
    alone = numbers(folder, tmp_path / "one" / "process0", parse_mesh("data:4,model:2"))
    for i in range(2):
        with np.load(out / f"{i}.npz") as found:
            assert str(found["banner"]).startswith(f"process {i} of 2, 8 x ")
            assert set(found.files) == {*alone, "banner"}
            for name, wanted in alone.items():
                np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    export, wanted = (SafetensorsFolder(tmp_path / name / "export") for name in ("two", "one"))
    assert export.shapes() == wanted.shapes()
    before = SafetensorsFolder(folder)
    # The optimiser's first step is the sign of the gradient, about 1e-2, but where that is next to nothing.
    for name, shape in wanted.shapes().items():
        whole = (slice(None),) * len(shape)
        np.testing.assert_allclose(export.read(name, whole), wanted.read(name, whole), atol=5e-4, err_msg=name)
        assert not np.array_equal(export.read(name, whole), before.read(name, whole)), name


def launch(folder, out, *processes):
    arguments = [
        "--config=configs/scans/smollm2_135m.py",
        f"--config.model={folder}",
        "--config.batch_size=8",
        "--config.max_new_tokens=4",
        "--config.calibration_tokens=3",
        "--config.passages=2",
        "--config.anchors=('builtin:harmful/anchor#4','builtin:plain/anchor#4')",
        "--config.calibration=('builtin:harmful/calibration#4','builtin:plain/calibration#4')",
        "--config.evaluation=('builtin:lookalike/test#6','builtin:harmful/test#6')",
        "--config.kl_limit=100.0",
        "--mesh=data:4,model:2",
        f"--out={out}",
    ]
    return [sys.executable, "-m", "launch.scans", *arguments, *processes]


@pytest.mark.slow
def test_a_launch_script_on_two_processes(folder, tmp_path):
    port = free_port()
    by_hand = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    commands = [launch(folder, tmp_path / "two", *by_hand, f"--process_id={i}") for i in range(2)]
    environment = {"JAXSAFE_CACHE": str(tmp_path / "cache")}
    said = both(commands, environment | {"JAX_NUM_CPU_DEVICES": "4"})
    assert "process 0 of 2, 8 x " in said[0][1] and "process 1" not in said[1][1]
    eight = os.environ | environment | {"JAX_NUM_CPU_DEVICES": "8"}
    command = launch(folder, tmp_path / "one")
    alone = subprocess.run(command, cwd=HERE.parent, env=eight, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    two, one = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("two", "one"))
    assert two["comparisons"] == one["comparisons"]
    thresholds = [run["choice"].pop("threshold") for run in (two, one)]
    assert two["choice"] == one["choice"] and np.isclose(*thresholds, atol=1e-5)
    assert two["device"].startswith("8 x ")
    assert np.isclose(two["perplexity"]["after"], one["perplexity"]["after"], rtol=1e-4)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
