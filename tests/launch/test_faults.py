"""Whose fault an error is, and what a run says of it."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jinja2 import Environment
from launches import ROOT
from safetensors.numpy import load

from jaxsafe.model.layers import LayerRange
from launch.faults import MEMORY, of_input


def error_of(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def full_disk():
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)


INPUT = {
    "said by this package": (lambda: LayerRange.parse("x", "config.layers"), "config.layers"),
    "disk full": (full_disk, "No space left on device"),
    "no such file": (pathlib.Path("nowhere.csv").read_text, "nowhere.csv"),
    "not UTF-8": (lambda: b"\xff".decode("utf-8"), "utf-8"),
    "not JSON": (lambda: json.loads("{"), "line 1"),
    "no tensors": (lambda: load(b"xx"), "header"),
    "no template": (lambda: Environment().from_string("{% if %}"), "expression"),
    "no memory": (lambda: np.empty(1 << 52), MEMORY),
}


@pytest.mark.parametrize("case", INPUT)
def test_an_error_of_the_input_is_one_line(case):
    call, said = INPUT[case]
    line = of_input(error_of(call))
    assert said in line and "\n" not in line


def test_a_device_out_of_memory_names_what_to_lower():
    error = error_of(lambda: jnp.zeros((1 << 46,), jnp.float32).block_until_ready())
    assert isinstance(error, jax.errors.JaxRuntimeError) and of_input(error) == MEMORY and "config.batch_size" in MEMORY
    assert of_input(jax.errors.JaxRuntimeError("INTERNAL: oh")) is None


PROGRAM = {
    "a shape in jax": lambda: jnp.zeros(3) + jnp.zeros(4),
    "a shape in numpy": lambda: np.zeros(3) + np.zeros(4),
    "a stack of unlike arrays": lambda: np.stack([np.zeros(3), np.zeros(4)]),
    "a key": lambda: {}["a"],
    "a type": lambda: len(3),
}


@pytest.mark.parametrize("case", PROGRAM)
def test_an_error_of_the_program_is_told_apart(case, monkeypatch):
    monkeypatch.setattr("launch.faults.OWN", frozenset({"jaxsafe", __name__.partition(".")[0]}))
    assert of_input(error_of(PROGRAM[case])) is None


SCRIPT = """
import jax.numpy as jnp
from jaxsafe.model.layers import LayerRange
from launch import command

command.run(lambda: {})
"""


def ended(call, tmp_path, *flags):
    words = [sys.executable, "-c", SCRIPT.format(f"({call}, print('never'))"), *flags]
    environment = {"PYTHONPATH": str(ROOT), "JAXSAFE_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("call", ["jnp.zeros(3) + jnp.zeros(4)", "{}['a']"])
def test_a_fault_of_the_program_asks_for_a_report(call, tmp_path):
    done = ended(call, tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" in done.stderr and "error:" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "please report it" in last and f"jax {jax.__version__}" in last and "Python 3." in last


@pytest.mark.parametrize("debug", [False, True])
def test_bad_input_shows_its_traceback_where_it_is_asked_for(tmp_path, debug):
    done = ended("LayerRange.parse('x', 'config.layers')", tmp_path, f"--debug={debug}")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: config.layers")
    assert ("Traceback" in done.stderr) is debug
