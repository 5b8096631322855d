"""Seconds and memory of a training step of several runs of adapters, one after the other and at once.

    python -m benchmarks.many_runs
    python -m benchmarks.many_runs --model=smollm2-135m-instruct --runs=4 --batch=10 --length=64 --answer=32

Two CPU cores; a tiny random model by default. All runs have the same frozen weights and differ in seed and learning
rate; their losses are compared before anything is timed. Memory is what the compiler sets aside for a step beside its
arguments.

N runs, B rows, T tokens, R answer tokens of a row
"""

import dataclasses
import functools
import os
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.measure import CORES, alternate, emit
from jaxsafe.io.hub import load_hf, resolve
from jaxsafe.kernels.lora import LoRA
from jaxsafe.methods.together import Training, fixed_together, program, put, stacked
from jaxsafe.methods.trainer import FREE, FineTuning, begin, compiled_step
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params, init
from jaxsafe.rows import Batch, Row, pad_rows

TINY = ModelConfig(vocab=512, layers=4, embed=64, mlp=128, heads=4, kv_heads=2, head_dim=16, context=256)
ATOL = {"float32": 2e-3, "bfloat16": 2e-2}
"""How far losses (nats a token) of both ways may be apart."""


@dataclasses.dataclass
class Taken:
    """Steps of one program: each call takes one and returns the losses; `fixed` is what no step changes."""

    step: Any
    tree: Any
    batch: Batch
    fixed: Any

    def __call__(self) -> jax.Array:
        """One step."""
        self.tree, loss = self.step(self.tree, self.batch, self.fixed)
        return loss

    def memory(self) -> int:
        """Bytes that the compiler sets aside for a step, beside its arguments."""
        return self.step.lower(self.tree, self.batch, self.fixed).compile().memory_analysis().temp_size_in_bytes


def runs_of(config: ModelConfig, N: int, B: int, T: int, R: int) -> list[Training]:
    """Runs on random rows of T tokens, the last R of which are answers."""
    rng = np.random.default_rng(0)
    lora = LoRA(16, 32.0)
    return [
        Training(
            [Row(tuple(rng.integers(8, config.vocab, T).tolist()), T - R - 1) for _ in range(B)],
            FineTuning(1, B, learning_rate=1e-3 * (n + 1), lora=lora, slots=(T, R), seed=n),
        )
        for n in range(N)
    ]


def sides(config: ModelConfig, params: Params, runs: list[Training]) -> tuple[list[Taken], Taken]:
    """The runs each by itself, and all of them at once."""
    batches = [pad_rows(run.rows, run.settings.slots[0]) for run in runs if run.settings.slots]
    begun = [begin(config, params, run.rows, run.settings, FREE, None) for run in runs]
    trees, fixed, (recipe, *_) = zip(*begun, strict=True)
    at_once = Taken(program(recipe), stacked(trees), put(batches, None), fixed_together(fixed))
    alone = [
        Taken(compiled_step(recipe, tree), tree, jax.device_put(batch), fixed)
        for (tree, fixed, recipe), batch in zip(begun, batches, strict=True)
    ]
    return alone, at_once


def one_after_the_other(alone: list[Taken]) -> list[Any]:
    """A step of each run."""
    return [jax.block_until_ready(run()) for run in alone]


def main(argv: list[str]) -> None:
    """Makes the runs, checks that both ways learn alike, and measures."""
    del argv
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    N, shape = RUNS.value, (BATCH.value, LENGTH.value, ANSWER.value)
    tiny = dataclasses.replace(TINY, dtype=DTYPE.value)
    config, params = load_hf(resolve(MODEL.value), DTYPE.value) if MODEL.value else (tiny, init(tiny))
    alone, at_once = sides(config, params, runs_of(config, N, *shape))
    memory = {"memory_single_bytes": alone[0].memory(), "memory_together_bytes": at_once.memory()}
    for _ in range(3):
        losses, other = np.array(one_after_the_other(alone)), np.array(at_once())
        if not np.allclose(losses, other, atol=ATOL[DTYPE.value]):
            sys.exit(f"losses {losses} and {other} differ; nothing is timed")
    calls = {"single": functools.partial(one_after_the_other, alone), "together": at_once}
    times = alternate(calls, ROUNDS.value)
    a_run = {f"{side}_run_step_s": times[f"{side}_median_s"] / N for side in calls}
    ratio = times["single_median_s"] / times["together_median_s"]
    where = {"model": MODEL.value or "tiny", "dtype": DTYPE.value, "runs": N}
    sizes = dict(zip(("batch", "length", "answer"), shape, strict=True))
    emit("many_runs", ratio=ratio, **where, **sizes, **a_run, **memory, rounds=ROUNDS.value, **times)


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "", "a folder or a name; empty: a tiny random model")
    DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(ATOL), "of the frozen weights")
    RUNS = flags.DEFINE_integer("runs", 4, "runs", lower_bound=2)
    ROUNDS = flags.DEFINE_integer("rounds", 5, "timed steps of each way", lower_bound=1)
    BATCH = flags.DEFINE_integer("batch", 10, "rows", lower_bound=1)
    LENGTH = flags.DEFINE_integer("length", 48, "tokens a row", lower_bound=2)
    ANSWER = flags.DEFINE_integer("answer", 16, "answer tokens a row", lower_bound=1)
    app.run(main)
