"""What every benchmark shares: two cores, calls timed in turn, one JSON line a measurement."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxsafe.study.record import environment
from launch.accelerator import suit_cpu

CORES = 2
Call = Callable[[], Any]


def begin(cores: int = CORES) -> Any:
    """Keeps this process to `cores` cores, for JAX and PyTorch alike; returns the module `torch`.

    Programs are compiled as in launch scripts. To be called before the first array is made. Ends the
    program with one line where torch is absent.
    """
    if importlib.util.find_spec("torch") is None:
        sys.exit("this benchmark compares with PyTorch, which is not installed; pip install torch")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    suit_cpu()
    import torch

    torch.set_num_threads(cores)
    return torch


def seconds(call: Call) -> tuple[float, float]:
    """Wall-clock seconds and processor seconds (of all threads) of `call`, until the arrays it returns are there."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - processor


def alternate(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """The calls timed in turn (A B A B), so that a busy spell meets all of them; fields of a measurement.

    For each call its wall-clock median, minimum and maximum, and its median of processor seconds, which tells
    whether other programs took the cores away.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    fields = {}
    for name, pairs in times.items():
        wall, processor = zip(*pairs, strict=True)
        fields[f"{name}_median_s"] = statistics.median(wall)
        fields[f"{name}_min_s"], fields[f"{name}_max_s"] = min(wall), max(wall)
        fields[f"{name}_processor_s"] = statistics.median(processor)
    return fields


@dataclasses.dataclass(frozen=True)
class Contest:
    """One quantity in one dtype: our call, the peer's, and what at least has to be done for it.

    The floor is `repeats` times as long as the call of bare products takes, and `more_s` for what else must be moved;
    `flops` are its operations.
    """

    ours: Call
    peer: Call
    products: Call
    flops: float
    repeats: float = 1.0
    more_s: float = 0.0


def compare(name: str, peer: str, contests: Mapping[str, Contest], rounds: int, **fields: Any) -> None:
    """Times the calls of all dtypes in turn and emits the measurement `name`: the best of each side, and all of them.

    Each call is made once before, which compiles it.
    """
    sides = {"jaxsafe": "ours", peer: "peer", "products": "products"}
    calls = {f"{s}_{dtype}": getattr(c, field) for dtype, c in contests.items() for s, field in sides.items()}
    jax.clear_caches()
    first = {call: seconds(calls[call])[0] for call in calls}
    times = alternate(calls, rounds)
    floors = {dtype: c.repeats * times[f"products_{dtype}_median_s"] + c.more_s for dtype, c in contests.items()}
    mine, other = ({d: times[f"{side}_{d}_median_s"] for d in contests} for side in ("jaxsafe", peer))
    for dtype, contest in contests.items():
        fields[f"ratio_{dtype}"], fields[f"over_floor_{dtype}"] = (
            other[dtype] / mine[dtype],
            mine[dtype] / floors[dtype],
        )
        fields[f"compile_{dtype}_s"] = first[f"jaxsafe_{dtype}"] - mine[dtype]
        fields[f"floor_{dtype}_gflops_per_s"] = contest.flops / floors[dtype] / 1e9
    best, least = min(mine.values()), min(floors.values())
    emit(
        name,
        median_s=best,
        ratio=min(other.values()) / best,
        floor_s=least,
        jaxsafe_over_floor=best / least,
        **{f"{peer}_over_floor": min(other.values()) / least},
        rounds=rounds,
        **fields,
        **times,
    )


def emit(name: str, **fields: Any) -> None:
    """Prints the measurement `name` as one line of JSON, with versions, processor and load."""
    present = [package for package in ("torch", "transformers") if importlib.util.find_spec(package)]
    versions = {package: importlib.metadata.version(package) for package in present}
    where = {"processor": processor_name(), "cores": usable_cores(), "load": os.getloadavg()[0]}
    line = {"name": name, **fields, **vars(environment()), **versions, **where}
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def usable_cores() -> int | None:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor_name() -> str:
    """The processor's name as the system tells it."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
