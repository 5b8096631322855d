"""No cost grows faster than it must; and the benchmarks that measure growth and accelerators run."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import new_cache
from tiny import tiny_config

from benchmarks.growth import Case, lines
from jaxsafe.model.attention import Slots
from jaxsafe.model.transformer import Transformer, variables
from jaxsafe.model.weights import shapes
from jaxsafe.parallel import make_mesh
from jaxsafe.plan.plan import plan
from jaxsafe.plan.tasks import Work

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = tiny_config(embed=64, mlp=128, head_dim=16, vocab=304, context=2048)
WORK = Work(batch=8, length=32, new_tokens=8, samples=16, sample_batch=8)


def of(task, config=CONFIG, devices=1, **work):
    mesh = make_mesh({"data": devices, "model": 1}, jax.devices()[:devices])
    return plan(config, mesh, task, dataclasses.replace(WORK, **work)).steps[0]


def test_memory_of_scores_is_flat_in_samples():
    few, many = of("snip", samples=16), of("snip", samples=1600)
    assert many.memory == few.memory
    assert (few.runs, many.runs) == (2, 200)


def test_memory_of_scores_grows_with_a_batch_and_no_faster():
    small, large = of("snip", sample_batch=8), of("snip", sample_batch=32)
    assert large.groups == small.groups
    assert small.temporaries < large.temporaries < 4.2 * small.temporaries


@pytest.mark.parametrize("task", ["generation", "snip"])
def test_temporaries_are_linear_in_length(task):
    long = {"batch": 2, "sample_batch": 2}
    half, whole = (of(task, dataclasses.replace(CONFIG, context=8192), length=n, **long) for n in (2048, 4096))
    assert whole.temporaries < 2.5 * half.temporaries


def test_devices_share_the_rows():
    one, four = of("snip", sample_batch=32), of("snip", sample_batch=32, devices=4)
    assert four.flops == one.flops / 4
    assert four.temporaries < 0.6 * one.temporaries


@pytest.mark.parametrize("task", ["generation", "snip", "fine_tuning"])
def test_a_compiled_program_is_as_long_for_any_number_of_layers(task):
    few, many = (of(task, dataclasses.replace(CONFIG, layers=n)) for n in (3, 24))
    assert many.instructions < 1.02 * few.instructions


def test_temporaries_of_a_decode_step_are_below_the_cache():
    B, S = 8, 1024
    cache = jax.eval_shape(lambda: new_cache(CONFIG, B, S))

    def step(params, cache, token, filled, slot):
        return Transformer(CONFIG).apply(variables(params), token, Slots(filled, slot), cache)

    given = (
        jax.ShapeDtypeStruct((B, 1), jnp.int32),
        jax.ShapeDtypeStruct((B, S), bool),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    stats = jax.jit(step, donate_argnums=1).lower(shapes(CONFIG), cache, *given).compile().memory_analysis()
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))
    assert stats.alias_size_in_bytes >= held
    assert stats.temp_size_in_bytes < held


def test_the_table_of_growth_has_a_line_a_program():
    (line,) = lines(Case("layers", 3, CONFIG, WORK), "snip", clock=True)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["layers 3", "snip sums"] and all(float(cell) > 0 for cell in cells[2:7])
    assert float(cells[-1]) >= 0


@pytest.mark.slow
def test_the_accelerator_benchmark_runs_on_anything():
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--rounds=1"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    _, _, *printed = (line for line in done.stdout.splitlines() if line.startswith("|"))
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed]
    rates = {(name, size): float(rate.replace(",", "")) for name, size, rate, *_ in table}
    passes = {(name, "2 x 16") for name in ("prefill", "loss", "Wanda", "SNIP", "LoRA step", "LoRA step, layers again")}
    blocks = {(f"attention{of}, blockwise", "1 x 512") for of in ("", " with gradients")}
    assert passes | blocks | {("decode", "1 x 4"), ("decode", "2 x 4")} == rates.keys()
    # A step of so small a model takes less time than the difference of two runs can tell.
    assert np.isfinite(list(rates.values())).all() and all(rates[name] > 0 for name in passes | blocks)
