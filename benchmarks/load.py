"""From files to devices: how much memory a process takes, and how fast it is beside a plain read of the same files.

    python -m benchmarks.load --layers=15 --mesh=data:1,model:2

Writes a random bfloat16 checkpoint of Llama-2-7B's shape to a temporary folder, which is deleted at the end, and loads
it by two processes of one CPU device each. The files are in the system's cache, having just been written, so that the
disk counts for neither side. Memory is that of the process alone ("anonymous") and with the pages of files that it has
mapped, which belong to the system's cache ("resident"). One line of JSON a process.
"""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file

from jaxsafe.io.hub import load_hf
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.families import config_to_hf
from jaxsafe.model.presets import preset
from jaxsafe.model.weights import hf_shapes
from jaxsafe.parallel import parse_mesh

PROCESSES = 2
FILE_BYTES = 2 * 10**9
BUFFER = 64 * 2**20
FIELDS = {"anonymous": "RssAnon", "resident": "VmRSS"}


def write(folder: pathlib.Path, config: ModelConfig) -> None:
    """A checkpoint of `config` in bfloat16 in files of about `FILE_BYTES`; tensors repeat the same random numbers."""
    noise = np.random.default_rng(0).standard_normal(2**24, np.float32).astype(ml_dtypes.bfloat16)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    part: dict[str, np.ndarray] = {}
    for name, shape in hf_shapes(config).items():
        part[name] = np.resize(noise, shape)
        if sum(tensor.nbytes for tensor in part.values()) > FILE_BYTES:
            save_file(part, folder / f"model-{name}.safetensors")
            part = {}
    save_file(part, folder / "model-last.safetensors")


def memory() -> dict[str, int]:
    """Bytes of this process by `FIELDS`, as Linux counts them."""
    status = pathlib.Path("/proc/self/status").read_text()
    entries = dict(line.split(":", 1) for line in status.splitlines())
    return {name: 1024 * int(entries[field].split()[0]) for name, field in FIELDS.items()}


class Peak(threading.Thread):
    """The most memory that the process has had since this was started, looked at a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = memory()
        self.end = threading.Event()

    def run(self) -> None:
        """Looks until `end` is set."""
        while not self.end.wait(0.01):
            self.most = {name: max(n, self.most[name]) for name, n in memory().items()}


def plain_read(folder: pathlib.Path, index: int) -> int:
    """Reads this process's share of the bytes of all files to one buffer; how many they are."""
    buffer, total = memoryview(bytearray(BUFFER)), 0
    for file in sorted(folder.glob("*.safetensors")):
        share = file.stat().st_size // PROCESSES
        with file.open("rb", buffering=0) as stream:
            stream.seek(index * share)
            left = share
            while left and (read := stream.readinto(buffer[: min(BUFFER, left)])):
                left, total = left - read, total + read
    return total


def load(folder: pathlib.Path, index: int, port: int, mesh: str) -> Mapping[str, float | int | str]:
    """What one of the processes measures, in GB and seconds."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, index)
    lengths = parse_mesh(mesh)
    start = time.perf_counter()
    read = plain_read(folder, index)
    plain = time.perf_counter() - start
    before, peak = memory(), Peak()
    peak.start()
    start = time.perf_counter()
    _, params = load_hf(folder, mesh=lengths)
    jax.block_until_ready(params)
    took = time.perf_counter() - start
    peak.end.set()
    peak.join()
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    after = {f"{name}_over_held": (n - before[name]) / held for name, n in peak.most.items()}
    return {
        "mesh": mesh,
        "process": index,
        "interpreter_gb": before["anonymous"] / 1e9,
        "held_gb": held / 1e9,
        **{f"peak_{name}_gb": n / 1e9 for name, n in peak.most.items()},
        **after,
        "load_s": took,
        "load_gb_per_s": held / took / 1e9,
        "plain_gb_per_s": read / plain / 1e9,
    }


def main(argv: list[str]) -> None:
    """Writes, starts the processes, and prints what they say."""
    del argv
    if PROCESS.value is not None:
        line = load(pathlib.Path(FOLDER.value), PROCESS.value, PORT.value, MESH.value)
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        write(pathlib.Path(folder), dataclasses.replace(preset("llama2-7b"), layers=LAYERS.value))
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        for mesh in MESH.value.split(";"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.load",
                f"--folder={folder}",
                f"--port={port}",
                f"--mesh={mesh}",
            ]
            workers = [subprocess.Popen([*command, f"--process={i}"], env=os.environ) for i in range(PROCESSES)]
            if sum(worker.wait() != 0 for worker in workers):
                sys.exit(f"a process that loads on {mesh} ended badly")


if __name__ == "__main__":
    LAYERS = flags.DEFINE_integer("layers", 15, "layers of the model; each has 0.4 GB", lower_bound=1)
    MESH = flags.DEFINE_string("mesh", "data:1,model:2;data:2,model:1", "meshes of two devices, one after the other")
    FOLDER = flags.DEFINE_string("folder", "", "of a process that loads: where the checkpoint is")
    PROCESS = flags.DEFINE_integer("process", None, "of a process that loads: which one it is")
    PORT = flags.DEFINE_integer("port", 0, "of a process that loads: where the first one listens")
    app.run(main)
