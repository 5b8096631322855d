"""What a compiled program sends between devices, read from its text."""

import collections
import dataclasses
import math
import re

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Of one kind: how many are run, and the bytes that a device sends for them (see `sent`)."""

    kind: str
    count: int
    bytes: float


def collectives(text: str, turn: bool | None = None) -> tuple[Collectives, ...]:
    """The collectives that a run of the compiled program `text` makes, each loop counted as often as it turns.

    A loop whose end is not known ahead counts for one turn; `turn` True gives only what lies inside of such loops,
    False only what lies outside.
    """
    found = _by_computation(text)
    once, outside = _runs(found, 1), _runs(found, 0)
    times = {None: once, False: outside, True: {name: once[name] - outside[name] for name in once}}[turn]
    totals: dict[str, tuple[int, float]] = {}
    for name in found:
        for kind, size in found[name].collectives if times[name] else ():
            count, total = totals.get(kind, (0, 0.0))
            totals[kind] = count + times[name], total + times[name] * size
    return tuple(Collectives(kind, n, size) for kind, (n, size) in sorted(totals.items()))


@dataclasses.dataclass
class _Computation:
    entry: bool
    collectives: list[tuple[str, float]]
    calls: list[tuple[str, int | None]]  # None: a loop of unknown length


def _by_computation(text: str) -> dict[str, _Computation]:
    found: dict[str, _Computation] = {}
    current = _Computation(False, [], [])
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = found[header[2]] = _Computation(header[1] is not None, [], [])
        elif instruction := _INSTRUCTION.match(line):
            shape, operation = instruction.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                current.collectives.append((kind, sent(kind, _size(shape, operation), _group(line))))
            turns = _TRIPS.search(line)
            times = 1 if operation != "while" else int(turns[1]) if turns else None
            names = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                names += [name.strip().lstrip("%") for name in branches.split(",")]
            current.calls += [(name, times) for name in names]
    return found


def _runs(found: dict[str, _Computation], unknown: int) -> dict[str, int]:
    """How often each computation runs, loops of unknown length as given; callees stand before callers in the text."""
    runs: dict[str, int] = collections.defaultdict(int)
    for name in reversed(found):
        runs[name] += found[name].entry
        for called, times in found[name].calls:
            if called in found:
                runs[called] += runs[name] * (unknown if times is None else times)
    return {name: runs[name] for name in found}


def _size(shape: str, operation: str) -> float:
    """Bytes of a result; an operation's start returns its operands beside it, of which the largest array is taken."""
    arrays = [(BYTES.get(dtype, 0), filter(None, dims.split(","))) for dtype, dims in _ARRAY.findall(shape)]
    sizes = [item * math.prod(map(int, dims)) for item, dims in arrays]
    return max(sizes, default=0.0) if operation.endswith("-start") else sum(sizes)


def _group(line: str) -> int:
    """How many devices take part together, from any of the three spellings of replica groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        lengths = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        return math.prod(lengths[name] for name in re.findall(r"'(\w+)'", axes[2]))
    return 2


def sent(kind: str, result: float, devices: int) -> float:
    """The bytes that each device sends when `devices` of them make a `result` of so many bytes, by rings."""
    share = (devices - 1) / devices
    match kind:
        case "all-reduce":
            return 2 * share * result
        case "reduce-scatter":
            return (devices - 1) * result
        case "collective-permute":
            return result
    return share * result
