"""Whether the machine has an accelerator: JAX may leave it alone, and without one programs are a CPU's."""

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping

import jax

from jaxsafe.devices import compiling_sooner, keep_freed_memory

GPU_FILES = ("/dev/nvidia0", "/proc/driver/nvidia")
TPU_FILES = ("/dev/accel0", "/dev/accel/0")
SHARED_FILES = ("/dev/vfio/0",)  # of newer TPUs, and of what is passed through to a virtual machine
TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "TPU_CHIPS_PER_HOST_BOUNDS")
PLUGINS = {"gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the machine shows: devices of each kind ("gpu", "tpu"), and those whose software is installed."""

    devices: frozenset[str] = frozenset()
    installed: frozenset[str] = frozenset()


def evidence(
    exists: Callable[[str], bool] = os.path.exists,
    variables: Mapping[str, str] = os.environ,
    program: Callable[[str], str | None] = shutil.which,
    package: Callable[[str], object] = importlib.util.find_spec,
) -> Evidence:
    """What this machine shows."""
    tpu = any(map(exists, TPU_FILES)) or (any(map(exists, SHARED_FILES)) and any(v in variables for v in TPU_VARIABLES))
    gpu = any(map(exists, GPU_FILES)) or program("nvidia-smi") is not None
    devices = {kind for kind, seen in (("gpu", gpu), ("tpu", tpu)) if seen}
    installed = {kind for kind, names in PLUGINS.items() if any(map(package, names))}
    return Evidence(frozenset(devices), frozenset(installed))


def unused(backend: str, platforms: str, seen: Evidence) -> str | None:
    """One line on an accelerator that JAX, on `backend`, leaves alone, and what to do; None where all is well.

    `platforms` is what the user asked JAX for (JAX_PLATFORMS); where that is anything, it is meant.
    """
    if backend != "cpu" or platforms or not seen.devices:
        return None
    kind = min(seen.devices)
    name = {"gpu": "an NVIDIA GPU", "tpu": "a TPU"}[kind]
    check = {"gpu": "see whether nvidia-smi works and the driver is new enough", "tpu": "see whether it is in use"}[
        kind
    ]
    what = (
        f"JAX's plugin for it does not start, {check}" if kind in seen.installed else f'pip install "jaxsafe[{kind}]"'
    )
    return f"this machine has {name}, but JAX computes on the CPU: {what} (if that is meant, set JAX_PLATFORMS=cpu)"


def unused_here() -> str | None:
    """`unused` of this process."""
    return unused(jax.default_backend(), os.environ.get("JAX_PLATFORMS", ""), evidence())


def suit_cpu() -> None:
    """Where programs are a CPU's, has them compiled sooner (see `compiling_sooner`) and their memory kept.

    To be called before the first array is made. Programs are run on the main thread, since memory is kept for that one.
    """
    if evidence().devices and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    os.environ["XLA_FLAGS"] = compiling_sooner(os.environ.get("XLA_FLAGS", ""), jax.__version_info__)
    if "GLIBC_TUNABLES" not in os.environ and keep_freed_memory():
        jax.config.update("jax_cpu_enable_async_dispatch", False)
