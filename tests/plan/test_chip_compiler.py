"""The main kernels as the TPU's own compiler makes them, for a slice of eight v5e that need not be there.

Two layers of Llama-2-7B, of shapes alone, on 2 x 4 chips. Less is optimised than for a run, which takes a fifth of the
time; how arrays are split, in which dtype and in which tiles they lie does not follow from that.
"""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import pytest

from jaxsafe.devices import chip
from jaxsafe.model.presets import preset
from jaxsafe.model.weights import flatten, weights
from jaxsafe.parallel import make_mesh
from jaxsafe.plan.collectives import BYTES
from jaxsafe.plan.tasks import TASKS, Work, device_bytes, scoring
from launch.plan import described

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed"
    ),
]
LENGTHS = {"data": 2, "model": 4}
CONFIG = dataclasses.replace(preset("llama2-7b"), layers=2)
WORK = Work(batch=8, length=192, new_tokens=64, sample_batch=8)  # no activation is as long as a weight
PROGRAMS = {
    "generation": TASKS["generation"],
    "snip": TASKS["snip"],
    "gram": functools.partial(scoring, "gram"),
    "fine_tuning": TASKS["fine_tuning"],
    "lora": TASKS["lora"],
}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s*(ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]*)\))?)?")


@dataclasses.dataclass(frozen=True)
class Made:
    """An array of a compiled program: what makes it, its dtype and axes, which lie in `order`, the last axis first,
    padded to multiples of `tile` along the fastest ones."""

    operation: str
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]

    @property
    def axes(self):
        """The axes that are longer than 1, in one order."""
        return axes(self.shape)

    @property
    def bytes(self):
        """Without padding."""
        return BYTES[self.dtype] * math.prod(self.shape)

    @property
    def held(self):
        """Bytes with padding."""
        lengths = [self.shape[axis] for axis in self.order]
        for i, part in enumerate(reversed(self.tile)):
            if i < len(lengths):
                lengths[i] = -(-lengths[i] // part) * part
        return BYTES[self.dtype] * math.prod(lengths)


def axes(shape):
    return tuple(sorted(n for n in shape if n > 1))


def arrays(text):
    """The arrays that a compiled program has in memory, and those that its collectives make inside of fusions.

    Inside a fusion nothing has memory of its own but what it returns.
    """
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text))
    inside, found = False, []
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            inside = header[1] in fused
        elif instruction := INSTRUCTION.match(line):
            root, result, operation, _ = instruction.groups()
            if inside and not root and not operation.startswith("all-gather"):
                continue
            for dtype, *layout in ARRAY.findall(result):
                if dtype in BYTES:
                    found.append(
                        Made(operation, dtype, *(tuple(int(n) for n in part.split(",") if n) for part in layout))
                    )
    return found


@functools.cache
def compiled(name):
    """A program and what its compiler made of it."""
    devices = described(chip("v5e"), LENGTHS)
    program = PROGRAMS[name](CONFIG, make_mesh(LENGTHS, devices), WORK)[0]
    return program, program.compile()


@pytest.fixture(autouse=True)
def as_a_tpu_does(monkeypatch):
    """Traced as on a TPU; programs for devices that are not there cannot be read back from the cache."""
    wanted = {
        "jax_optimization_level": "O1",
        "jax_default_matmul_precision": None,
        "jax_enable_compilation_cache": False,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def forms(shape, weight):
    """The axes of an array of a weight, and those where its inputs are one axis and its outputs another."""
    n_out, lead = len(weight.outputs), shape[: len(shape) - len(weight.inputs + weight.outputs)]
    flat = (*lead, math.prod(shape[len(lead) : len(shape) - n_out]), math.prod(shape[len(shape) - n_out :]))
    return {axes(shape), axes(flat)} if weight.linear else {axes(shape)}


def matrices(program):
    """(weight, its shape, that of a device's share, that of the share with all of the data axis) of every matrix."""
    for path, leaf in flatten(program.groups["parameters"]).items():
        weight, share = weights(CONFIG)[path], leaf.sharding.shard_shape(leaf.shape)
        if weight.kind == "map":
            by_axis = zip(leaf.sharding.spec, leaf.shape, share, strict=True)
            yield weight, leaf.shape, share, tuple(n if axis == "data" else own for axis, n, own in by_axis)


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_device_gathers_a_weight_that_its_block_does_not_need(name):
    """A block needs, of its own weights, the rows of all the data axis and a share of the model axis.

    Refused is the result of an all-gather that holds a matrix whole, over both axes, or of several layers. Of the
    embedding and the unembedding, which no loop over layers reads, all of the data axis may be gathered.
    """
    program, found = compiled(name)
    refused = {}
    for weight, whole, _, gathered in matrices(program):
        for shape in (whole, whole[1:], gathered) if weight.stacked else (whole,):
            refused |= dict.fromkeys(forms(shape, weight), weight.path)
    made = [a for a in arrays(found.as_text()) if a.operation.startswith("all-gather")]
    assert made
    assert not [(refused[a.axes], a) for a in made if a.axes in refused]


def in_float32(name):
    """The float32 arrays of a program that are as long as a weight, or one layer's, whole or split."""
    program, found = compiled(name)
    of_weights = set()
    for weight, *shapes in matrices(program):
        for shape in shapes:
            of_weights |= forms(shape, weight) | (forms(shape[1:], weight) if weight.stacked else set())
    return [a for a in arrays(found.as_text()) if a.dtype == "f32" and a.axes in of_weights]


@pytest.mark.parametrize("name", ["generation", "lora"])
def test_no_array_in_float32_is_as_long_as_a_weight(name):
    assert not in_float32(name)


@pytest.mark.parametrize("name", ["snip", "gram"])
def test_no_weight_is_converted_to_float32(name):
    """Sums are float32 and as long as weights, but no conversion makes them."""
    assert in_float32(name)
    assert not [a for a in in_float32(name) if a.operation == "convert"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_padding_takes_less_than_a_tenth(name):
    """Of what the program is given, by the compiler's own count, and of all that it makes, by the tiles of arrays."""
    program, found = compiled(name)
    given = sum(device_bytes(tree) for group, tree in program.groups.items() if group != "cache")
    if name == "gram":  # reads no unembedding, which is therefore not given
        given -= device_bytes(program.groups["parameters"]["unembed"])
    assert found.memory_analysis().argument_size_in_bytes < 1.1 * given
    made = [a for a in arrays(found.as_text()) if a.operation not in ("parameter", "tuple", "get-tuple-element")]
    assert sum(a.held for a in made) < 1.1 * sum(a.bytes for a in made)
