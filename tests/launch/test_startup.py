"""What a launch script starts with: how soon, the compilation cache, a trace, and the processes of a run."""

import os
import pathlib
import platform
import subprocess
import sys
import time

import jax
import pytest
from tiny import tiny_config, tiny_params

from jaxsafe.devices import compiling_sooner
from jaxsafe.evaluation.utilisation import Tokens, utilisation
from jaxsafe.io.hf import save_hf
from jaxsafe.model.weights import count_parameters, shapes
from launch import command
from launch.progress import Clock, use_line

ROOT = pathlib.Path(__file__).parents[2]
IMPORTS = """
import time
import jax
start = time.perf_counter()
import jaxsafe
print(time.perf_counter() - start)
"""
FLAGS = """
import os
from launch import command

command.run(lambda: print(os.environ["XLA_FLAGS"]))
"""
SCRIPT = """
import jax, jax.numpy as jnp
from launch import command

def main():
    @jax.jit
    def tower(x):
        with jax.named_scope("attention"):
            return jnp.linalg.norm(jnp.sin(x) @ x)
    tower(jnp.ones((64, 64))).block_until_ready()
    print(jax.config.jax_compilation_cache_dir)
    print(jax.config.jax_enable_compilation_cache)

command.run(main)
"""


def python(code, *arguments, **environment):
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120, check=False)


def test_the_import_costs_little():
    # Half a second at most on an idle machine; the bound is for a busy one.
    assert float(python(IMPORTS).stdout) < 1.5


def test_compiled_programs_are_kept_and_a_trace_is_written(tmp_path):
    trace = tmp_path / "trace"
    done = python(SCRIPT, f"--profile={trace}", JAXSAFE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "cache" / "compiled"), "True"]
    (found,) = trace.rglob("*.xplane.pb")
    assert b"tower" in found.read_bytes()


def test_a_launch_script_on_a_cpu_compiles_sooner():
    done = python(FLAGS, XLA_FLAGS="", JAX_PLATFORMS="cpu")
    assert done.stdout.strip() == compiling_sooner("", jax.__version_info__), done.stderr


FAULTS = """
import resource
import jax, jax.numpy as jnp
from launch import command

def main():
    tower = jax.jit(lambda x: jnp.tanh(x @ x).sum())
    x = jnp.ones((3000, 3000))
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tower(x).block_until_ready()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / x.nbytes)

command.run(main)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's memory")
def test_a_launch_script_on_a_cpu_keeps_the_memory_of_its_programs(tmp_path):
    variables = {"JAX_PLATFORMS": "cpu", "JAXSAFE_CACHE": str(tmp_path), "XLA_FLAGS": ""}
    kept, told = (float(python(FAULTS, **variables, **more).stdout) for more in ({}, {"GLIBC_TUNABLES": "x=1"}))
    assert kept < 0.05 < 0.9 < told


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_processes=2"], "go together; give all three"),
        (["--coordinator=localhost:1", "--process_id=0"], "go together; give all three"),
        (["--distributed"], "no cluster was found"),
    ],
)
def test_processes_that_cannot_meet_are_refused_in_one_line(flags, said, tmp_path):
    done = python(SCRIPT, *flags, JAXSAFE_CACHE=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error:")


def test_a_mesh_is_chosen_and_what_it_does_not_divide_is_told_once(tmp_path, capsys):
    config = tiny_config()
    save_hf(tmp_path / "model", config, tiny_params(config))
    chosen = command.mesh_of("", str(tmp_path / "model"), None)
    assert dict(chosen.shape) == {"data": 8, "model": 1}
    assert capsys.readouterr().err.splitlines() == ["mesh data 8, model 1"]
    asked = command.mesh_of("data:2,model:4", str(tmp_path / "model"), None)
    assert dict(asked.shape) == {"data": 2, "model": 4}
    assert capsys.readouterr().err.splitlines() == [
        "mesh data 2, model 4",
        "every device holds whole what is not divided: kv_heads 2 by model 4",
    ]


class Chip:
    device_kind = "TPU v4"


def test_shares_of_known_peaks():
    config = tiny_config()
    count = count_parameters(shapes(config)) - config.vocab * config.embed
    tokens = Tokens(read=200, written=60) + Tokens(read=100, learned=50, written=40)
    found = utilisation(config, [Chip(), Chip()], tokens, batch=10, seconds=2.0)
    assert found["tokens_per_s"] == 225 and found["new_tokens_per_s"] == 50
    assert found["model_flops_share"] == pytest.approx((2 * 400 + 6 * 50) * count / (2 * 2 * 275e12))
    assert found["bandwidth_share"] == pytest.approx(4 * count * 10 / (2 * 2 * 1228e9))
    assert utilisation(config, jax.devices(), Tokens(learned=8), 10, 2.0) == {"tokens_per_s": 4}


def test_time_within_another_stage_counts_once():
    clock = Clock()
    with clock.stage("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with clock.stage("inner"):
                time.sleep(0.1)
    assert 0.02 <= clock.seconds["outer"] < 0.1 and clock.seconds["inner"] >= 0.2
    clock.count("inner", Tokens(read=10, written=5))
    timings = clock.record(tiny_config(), 4)
    assert use_line(timings).startswith("inner ") and "new)" in use_line(timings)
    assert timings["use"].keys() == {"inner"}


@pytest.mark.slow
def test_the_benchmark_of_the_start_tells_all_four_times(folder):
    command = [sys.executable, "-m", "benchmarks.startup", f"--model={folder}"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = dict(line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:])
    assert list(rows) == ["import jax", "import jaxsafe", "first token, first run", "first token, second run"]
    assert 0 < float(rows["import jax"]) < float(rows["first token, second run"])
