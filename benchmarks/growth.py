"""How cost grows: with samples, length, batch, layers and devices, by the compiler's own analysis and by the clock.

    python -m benchmarks.growth

A model as wide as SmolLM2-135M; one quantity is changed at a time. Per run of a program and device: operations, bytes
moved, what it holds and its temporaries, the instructions of the compiled program and the seconds to compile it; and
the seconds of the whole task as measured on one device, for texts of up to 1,024 tokens. Prints Markdown.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags

from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.kernels.sums import Scoring, gather
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.presets import preset
from jaxsafe.model.transformer import init
from jaxsafe.parallel import make_mesh
from jaxsafe.plan.plan import Plan, plan
from jaxsafe.plan.tasks import Work
from jaxsafe.rows import Batch, Row

BASE = dataclasses.replace(preset("smollm2-135m"), layers=6, vocab=8192, dtype="float32")
WORK = Work(batch=8, length=128, new_tokens=32, samples=16, sample_batch=8)
TASKS = ("generation", "snip")
LONGEST_MEASURED = 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: `quantity` = `value`, and what follows from it."""

    quantity: str
    value: int
    config: ModelConfig = BASE
    work: Work = WORK
    devices: int = 1


def cases() -> Iterator[Case]:
    """What is compared, one quantity after another."""
    for n in (8, 16, 32):
        yield Case("samples", n, work=dataclasses.replace(WORK, samples=n))
    for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
        yield Case("length", n, work=dataclasses.replace(WORK, length=n))
    for n in (2, 4, 8, 16):
        yield Case("batch", n, work=dataclasses.replace(WORK, batch=n, sample_batch=n))
    for n in (3, 6, 12, 24):
        yield Case("layers", n, dataclasses.replace(BASE, layers=n))
    for n in (1, 2, 4, 8):
        yield Case("devices (data)", n, devices=n)


def planned(case: Case, task: str) -> Plan:
    """The case on its devices."""
    mesh = make_mesh({"data": case.devices, "model": 1}, jax.devices()[: case.devices])
    return plan(case.config, mesh, task, case.work)


def measured(case: Case, task: str) -> float:
    """Seconds of the task on one device, compiled before."""
    config, work = case.config, case.work
    params = jax.jit(init, static_argnums=(0, 1))(config, 0)
    rng = np.random.default_rng(0)
    if task == "generation":
        tokens = rng.integers(8, config.vocab, (work.batch, work.length), np.int32)
        ends = np.full(work.batch, work.length - 1, np.int32)
        batch = Batch(tokens, np.ones(tokens.shape, bool), ends)
        return seconds(lambda: generate(config, params, batch, Decoding(work.new_tokens)).tokens)
    ids = rng.integers(8, config.vocab, (work.samples, work.length)).tolist()
    rows = [Row(tuple(row), work.length // 2 - 1) for row in ids]
    return seconds(lambda: gather(Scoring("snip", batch_size=work.sample_batch), config, params, rows).sums)


def seconds(call: Callable[[], Any]) -> float:
    """Of the better of two calls, after one that compiles."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def lines(case: Case, task: str, clock: bool) -> Iterator[str]:
    """The table's lines of a case, one a program."""
    found = planned(case, task)
    clock = clock and case.devices == 1 and case.work.length <= LONGEST_MEASURED
    took = f"{measured(case, task):.2f}" if clock else "-"
    for step in found.steps:
        held = sum(size for name, size in step.groups.items() if name != "parameters")
        numbers = [
            f"{step.flops / 1e9:.3g}",
            *(f"{n / 1e6:.4g}" for n in (step.moved, held, step.temporaries)),
            str(step.instructions),
            f"{step.compile_seconds:.1f}",
            took,
        ]
        yield f"| {case.quantity} {case.value} | {step.name} | " + " | ".join(numbers) + " |"


def main(argv: list[str]) -> None:
    """Prints the table, task after task."""
    del argv
    jax.config.update("jax_num_cpu_devices", 8)
    columns = ("GFLOP", "MB moved", "MB cache or sums", "MB temporaries", "instructions", "compile s", "task s")
    print("| | program | " + " | ".join(columns) + " |\n|---|---|" + "---:|" * len(columns))
    for task in TASKS:
        for case in cases():
            for line in lines(case, task, CLOCK.value):
                print(line, flush=True)


if __name__ == "__main__":
    CLOCK = flags.DEFINE_bool("clock", True, "measure the tasks as well")
    app.run(main)
