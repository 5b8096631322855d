"""Where the time of a whole quickstart goes: seconds by stage, beside the floor of the tokens that a stage goes over.

    python -m benchmarks.pipeline --task=scans

Runs `launch.quickstart` in a process of its own, with an empty cache unless --cache names a folder, and prints its
stages as Markdown. The floor is two operations a parameter and token that is read or written, six where it is learned
from, at the rate of bare products measured right after it; it is known of the stages whose tokens are counted. What
compiling takes is part of the stages in which it falls.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks.forward_and_generate import flops, products
from benchmarks.measure import processor_name, seconds
from jaxsafe.io.hub import load_hf, resolve
from jaxsafe.model.weights import count_parameters

LEARNED = "safety_tuning_s"
B, T = 32, 48


def run(task: str, size: str, cache: str, out: pathlib.Path) -> dict:
    """The record of a quickstart. Ends the program where it fails."""
    command = [sys.executable, "-m", "launch.quickstart", f"--task={task}", f"--size={size}", f"--out={out}"]
    done = subprocess.run(command, env=os.environ | {"JAXSAFE_CACHE": cache}, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])} ended with status {done.returncode}; nothing is measured")
    return json.loads((out / "run.json").read_text())


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    with tempfile.TemporaryDirectory() as work:
        record = run(TASK.value, SIZE.value, CACHE.value or f"{work}/cache", pathlib.Path(work, "out"))
    config, params = load_hf(resolve("smollm2-135m-instruct"), record["config"]["dtype"])
    call = products(config, B, T, T, 0)
    seconds(call)
    rate = flops(config, B, T, T, 0) / min(seconds(call)[0] for _ in range(5))
    timings = record["timings"]
    use = timings.pop("use", {})
    print(f"{processor_name()}, jax {record['environment']['jax']}, {config.dtype}, {rate / 1e9:.0f} GFLOP/s\n")
    print("| stage | seconds | tokens | floor, seconds | floor / stage |\n|---|---:|---:|---:|---:|")
    for stage, took in timings.items():
        tokens = use.get(stage, {}).get("tokens_per_s", 0) * took
        least = (6 if stage == LEARNED else 2) * count_parameters(params) * tokens / rate
        counted = f"{tokens:.0f} | {least:.1f} | {least / took:.0%}" if tokens else " | | "
        print(f"| {stage.removesuffix('_s').replace('_', ' ')} | {took:.1f} | {counted} |")
    print(f"| all | {sum(took for stage, took in timings.items() if stage != 'compile_s'):.1f} | | | |")


if __name__ == "__main__":
    TASK = flags.DEFINE_string("task", "overrefusal", "a task of the quickstart")
    SIZE = flags.DEFINE_enum("size", "whole", ["whole", "small"], "of its prompt sets")
    CACHE = flags.DEFINE_string("cache", "", "the cache of models and programs; empty: a new one")
    app.run(main)
