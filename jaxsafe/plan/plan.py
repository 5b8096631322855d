"""Does a job fit these devices, and how long must it take at the least?

The programs are compiled ahead of time for the mesh, on simulated devices, from shapes alone. The compiler says how
much memory its temporaries take and what is sent between devices; arguments follow from the shapes, and operations
from the configuration.

What to make of the numbers. A CPU multiplies bfloat16 in float32, for which its compiler would keep copies of all
weights; so programs are compiled in float32, and what is sent is halved for a model in bfloat16. Temporaries are left
as they are, and are rough: in generation with Llama-2-7B on 8 chips the compiler for v5e wants 0.5 GB where this one
wants 0.7 GB. A tenth of the memory is therefore kept free, and `described` devices let the chip's own compiler say what
it wants. Times are rooflines: each program takes the longest of computing at the chip's peak, of moving what it must
read and write once, and of sending what its collectives send, by one axis of the torus. Little runs as fast; a half to
two thirds of it is good.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsafe.devices import Chip
from jaxsafe.model.config import ModelConfig
from jaxsafe.parallel import make_mesh
from jaxsafe.plan.collectives import Collectives, collectives
from jaxsafe.plan.tasks import IN_TURNS, TASKS, Program, Work, device_bytes

# A float32 product of full precision takes this many bfloat16 passes.
EXACT_PASSES = 6
# The share of a memory that a job may fill.
FILLED = 0.9


@dataclasses.dataclass(frozen=True)
class Step:
    """One program on one device. Per run: bytes held by group and as temporaries, operations, bytes moved and sent.

    Temporaries are infinite where the chip's own compiler refuses a program for lack of memory. `instructions` is the
    length of the compiled program, which took `compile_seconds` to make.
    """

    name: str
    runs: int
    groups: Mapping[str, float]
    temporaries: float
    flops: float
    exact: bool
    moved: float
    collectives: tuple[Collectives, ...]
    instructions: int
    compile_seconds: float

    @property
    def memory(self) -> float:
        """Bytes held at once."""
        return sum(self.groups.values()) + self.temporaries

    def times(self, chip: Chip) -> dict[str, float]:
        """Seconds of a run, were there nothing but computing, reading and writing memory, or sending."""
        sent = sum(c.bytes for c in self.collectives)
        return {
            "compute": self.flops * (EXACT_PASSES if self.exact else 1) / chip.flops,
            "memory": self.moved / chip.bandwidth,
            "network": sent / chip.axis_bandwidth,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a task takes of every device of a mesh {"data": n, "model": m}.

    `work` is what the task is given; it goes over the samples in so many `passes`.
    """

    task: str
    mesh: Mapping[str, int]
    steps: tuple[Step, ...]
    work: Work
    passes: int = 1

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.values())

    @property
    def memory(self) -> float:
        """Bytes that a device must have."""
        return max(step.memory for step in self.steps)

    def fits(self, chip: Chip) -> bool:
        """Whether a chip's memory holds it."""
        return self.memory <= FILLED * chip.memory

    def seconds(self, chip: Chip) -> float:
        """The roofline time of the whole task."""
        return sum(step.runs * max(step.times(chip).values()) for step in self.steps)


def plan(config: ModelConfig, mesh: Mesh, task: str, work: Work, described: Sequence[Any] | None = None) -> Plan:
    """What `task` (one of `TASKS`) takes on `mesh`.

    `described` are devices of a chip's own compiler (`jax.experimental.topologies`), as many as the mesh has; they
    give the temporaries. Raises ValueError for an unknown task and for rows that do not divide over the data axis.
    """
    rough = outline(config, mesh, task, work)
    compiled = TASKS[task](dataclasses.replace(config, dtype="float32"), mesh, work)
    own = compiled if described is None else TASKS[task](config, make_mesh(mesh.shape, described), work)
    item = jnp.dtype(config.dtype).itemsize / 4
    steps = tuple(_with_compiled(*each, item) for each in zip(rough.steps, compiled, own, strict=True))
    return dataclasses.replace(rough, steps=steps)


def outline(config: ModelConfig, mesh: Mesh, task: str, work: Work) -> Plan:
    """The plan of `task` without what a compiler alone knows, temporaries and what is sent; nothing is compiled.

    Raises ValueError as `plan`.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not known; use one of {', '.join(TASKS)}")
    rows = work.batch if task == "generation" else work.sample_batch
    if rows % mesh.shape["data"]:
        raise ValueError(f"a batch of {rows} rows does not divide over {mesh.shape['data']} devices of the data axis")
    steps = tuple(map(_outlined, TASKS[task](config, mesh, work)))
    return Plan(task, dict(mesh.shape), steps, work, work.passes(config) if task in IN_TURNS else 1)


def _outlined(program: Program) -> Step:
    groups = {name: device_bytes(tree) for name, tree in program.groups.items()}
    return Step(
        name=program.name,
        runs=program.runs,
        groups=groups,
        temporaries=0.0,
        flops=program.flops,
        exact=program.exact,
        moved=sum(times * groups[name] for name, times in program.touched.items()),
        collectives=(),
        instructions=0,
        compile_seconds=0.0,
    )


def _with_compiled(step: Step, in_float32: Program, own: Program, item: float) -> Step:
    start = time.perf_counter()
    compiled = in_float32.compile()
    took = time.perf_counter() - start
    text = compiled.as_text()
    found = collectives(text, in_float32.turn)
    return dataclasses.replace(
        step,
        temporaries=_temporaries(own, compiled if own is in_float32 else None),
        collectives=tuple(Collectives(c.kind, c.count, item * c.bytes) for c in found),
        instructions=text.count(" = "),
        compile_seconds=took,
    )


def _temporaries(program: Program, compiled: Any = None) -> float:
    """Bytes that `program` takes besides its groups, as `compiled`, or as it is compiled now."""
    try:
        stats = (compiled or program.compile()).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    made = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return max(made - device_bytes(program.covered), 0.0)


def meshes(config: ModelConfig, devices: int, rows: int, wider: bool = False) -> Iterator[dict[str, int]]:
    """Ways to lay out 1, 2, 4, ... up to `devices` devices: few first, then a model axis of up to 8 devices first.

    `rows` divide over the data axis; where it may be `wider` there are more, one or more a device.
    """
    widest = max(n for n in (1, 2, 4, 8) if config.heads % n == 0)
    n = 1
    while n <= devices:
        for model in dict.fromkeys((min(n, widest), n)):
            data = n // model
            if config.heads % model == 0 and (rows % data == 0 or (wider and data % rows == 0)):
                yield {"data": data, "model": model}
        n *= 2


def ways(work: Work, data: int) -> Iterator[Work]:
    """How training may take its samples on `data` devices of the data axis, the fastest way first.

    Layers are kept, or computed again; then samples are taken in 2, 4, ... parts, as long as each device has one.
    """
    yield dataclasses.replace(work, remat=False)
    parts = 1
    while work.sample_batch % (parts * data) == 0:
        yield dataclasses.replace(work, parts=parts)
        parts *= 2


def training(
    config: ModelConfig, mesh: Mesh, task: str, work: Work, chip: Chip, described: Sequence[Any] | None = None
) -> Plan:
    """The plan of `task` (one of `LEARNING`) by the first of the `ways` that fits `chip`; by the last if none does."""
    for way in ways(work, mesh.shape["data"]):
        found = plan(config, mesh, task, way, described)
        if found.fits(chip):
            break
    return found


Known = dict[tuple[str, tuple[int | None, ...]], Plan]
"""Plans of one model by task, and by mesh and layers at a time."""


def smallest(
    config: ModelConfig,
    chip: Chip,
    task: str,
    work: Work,
    devices: Sequence[Any],
    known: Known | None = None,
) -> Plan | None:
    """The plan of the first of the `meshes` on which `task` fits `chip`; None where it fits none of `devices`.

    Where it fits none with all layers at once, the first on which it fits in turns. A data axis that is longer than
    samples are at a time takes one a device. `known` holds the plans of this model that were made before, and gets
    those that are made.
    """
    known = {} if known is None else known
    sampled = task != "generation"
    lengths = meshes(config, len(devices), work.sample_batch if sampled else work.batch, wider=sampled)
    tried = [
        (make_mesh(each, devices[: math.prod(each.values())]), _widened(work, each["data"]) if sampled else work)
        for each in lengths
    ]
    at_once = (_fitting(config, chip, task, given, mesh, known) for mesh, given in tried)
    turns = (in_turns(config, chip, task, given, mesh, known) for mesh, given in tried)
    return next((each for each in itertools.chain(at_once, turns) if each is not None), None)


def _widened(work: Work, data: int) -> Work:
    return dataclasses.replace(work, sample_batch=max(work.sample_batch, data))


def in_turns(
    config: ModelConfig,
    chip: Chip,
    task: str,
    work: Work,
    mesh: Mesh,
    known: Known | None = None,
) -> Plan | None:
    """The plan of `task` on `mesh` with a half of the layers at a time, a quarter, ..., the most with which it fits.

    None where one layer does not, and for a task that does not go in turns. `known` as in `smallest`.
    """
    known, layers = {} if known is None else known, config.layers
    while task in IN_TURNS and layers > 1:
        layers = math.ceil(layers / 2)
        found = _fitting(config, chip, task, dataclasses.replace(work, layers=layers), mesh, known)
        if found is not None:
            return found
    return None


def _fitting(config: ModelConfig, chip: Chip, task: str, work: Work, mesh: Mesh, known: Known) -> Plan | None:
    """The plan, where `task` fits; nothing is compiled where what is held alone does not."""
    if not outline(config, mesh, task, work).fits(chip):
        return None
    key = task, (*mesh.shape.values(), work.layers)
    if key not in known:
        known[key] = plan(config, mesh, task, work)
    return known[key] if known[key].fits(chip) else None
