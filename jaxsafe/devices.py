"""What processors can do: published peaks of accelerators, for roofline times, and native number formats.

Sources: Google Cloud, "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (system architecture pages); NVIDIA, "H100 Tensor
Core GPU datasheet" (SXM, dense).
"""

import ctypes
import dataclasses
import pathlib
import platform

import jax

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: bfloat16 FLOP/s, memory in bytes, memory bandwidth and interconnect bandwidth in bytes/s.

    `interconnect` is what a chip can send to its neighbours; it receives as much at the same time. `topology` is the
    number of axes of the torus that a slice is cut from (0: a switch joins all). `kind` is how JAX names the chip.
    Memory counts a published GB as 10^9 bytes, which leaves about the share that the runtime keeps for itself.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    topology: int
    kind: str

    @property
    def axis_bandwidth(self) -> float:
        """Bytes/s that a chip sends along one axis of its torus."""
        return self.interconnect / max(self.topology, 1)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GB, 1228 * GB, 300 * GB, 3, "TPU v4"),
        Chip("v5e", 197e12, 16 * GB, 819 * GB, 200 * GB, 2, "TPU v5 lite"),
        Chip("v5p", 459e12, 95 * GB, 2765 * GB, 600 * GB, 3, "TPU v5"),
        Chip("v6e", 918e12, 32 * GB, 1640 * GB, 400 * GB, 2, "TPU v6 lite"),
        Chip("h100", 989e12, 80 * GB, 3350 * GB, 450 * GB, 0, "NVIDIA H100"),
    )
}


def chip(name: str) -> Chip:
    """The chip of this name. Raises ValueError for one that is not known."""
    if name.lower() not in CHIPS:
        raise ValueError(f"device {name!r} is not known; use one of {', '.join(CHIPS)}")
    return CHIPS[name.lower()]


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for one whose peaks are not in the table."""
    known = sorted(CHIPS.values(), key=lambda c: -len(c.kind))
    return next((c for c in known if device_kind.startswith(c.kind)), None)


CPUINFO = pathlib.Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
"""What Linux calls the instructions of x86 and Arm processors that multiply bfloat16."""


def multiplies_bfloat16() -> bool:
    """Whether the default devices multiply bfloat16 natively: accelerators do, of CPUs those that Linux says so of."""
    if jax.default_backend() != "cpu":
        return True
    return CPUINFO.is_file() and not BFLOAT16_FLAGS.isdisjoint(CPUINFO.read_text().split())


def suited_stream(dtype: str) -> str | None:
    """The `ModelConfig.stream` of a model of this `dtype` on the default devices.

    CPUs compute norms, activations and sums in float32 whatever they are of: what is not rounded between them is no
    slower there, and more precise. Accelerators move half as many bytes where it is.
    """
    return "float32" if dtype != "float32" and jax.default_backend() == "cpu" else None


def compiling_sooner(flags: str, version: tuple[int, ...]) -> str:
    """`flags` of XLA for a CPU, with less of LLVM's optimisation unless they say how much, for jax of this `version`.

    A program is compiled in five sixths of the time and no slower. Before jax 0.12 its loops over half-precision
    numbers would be, by far.
    """
    given = "xla_backend_optimization_level" in flags or version < (0, 12)
    return flags if given else f"{flags} --xla_backend_optimization_level=1".strip()


KEPT = {"M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**26), "M_MMAP_MAX": (-4, 0)}
"""By name what glibc calls an option (malloc.h), and its value: nothing is given back, nothing mapped by itself."""


def keep_freed_memory() -> bool:
    """Has this process keep the memory that it frees for what it allocates next; whether it could be told so.

    A program's temporaries otherwise come from the system, which clears every page, and go back to it at the end, each
    time that the program is run. It is so for what the main thread allocates alone, and of glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(option, value) for option, value in KEPT.values())
