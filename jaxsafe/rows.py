"""Rows of token ids as left-padded arrays of few shapes.

B batch, T slots
"""

import dataclasses
import hashlib
import itertools
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxsafe.parallel import fetch
from jaxsafe.progress import Progress

Tree = Any
"""A tree of arrays whose leading axis is that of the rows."""

SHORTEST = 32
"""Shorter rows are padded to so many slots behind shared ones: one more program costs more than padding."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Token `ids` of one text; `instruction_end` is the index of the last token before the answer begins."""

    ids: tuple[int, ...]
    instruction_end: int

    def __post_init__(self) -> None:
        if not 0 <= self.instruction_end < len(self.ids):
            raise ValueError(f"instruction_end {self.instruction_end} lies outside the row's {len(self.ids)} tokens")


@flax.struct.dataclass
class Batch:
    """Left-padded rows; NumPy arrays until they are put on the devices.

    tokens:          int32 [B, T]
    valid:           bool  [B, T], False on padding
    instruction_end: int32 [B], the slot of the last token before the answer
    shared:          how many first tokens of all rows are the same ones (part of the shape, no array)
    """

    tokens: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    instruction_end: Int[Array, " B"]
    shared: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def response(self) -> Bool[Array, "B T"]:
        """The tokens of the answer, where the rows hold one."""
        return self.valid & (np.arange(self.tokens.shape[1])[None] > self.instruction_end[:, None])


def bucket(n: int) -> int:
    """The least of 8, 12, 16, 24, 32, 48, 64, 96, ... that is not below `n`: two shapes per doubling."""
    size = 8
    while size < n:
        size *= 2
    return size * 3 // 4 if size > 8 and n <= size * 3 // 4 else size


def shared_tokens(rows: Sequence[Row]) -> int:
    """How many tokens all of `rows` begin with, none of them behind an instruction's end.

    A multiple of 8, so that another set of prompts under the same template has the same shapes; 0 for fewer than 16,
    which are not worth a pass of their own, and for a single row.
    """
    if len(rows) < 2:
        return 0
    columns = zip(*(row.ids[: row.instruction_end] for row in rows), strict=False)
    alike = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns))
    return alike // 8 * 8 if alike >= 16 else 0


def pad_rows(
    rows: Sequence[Row], length: int | None = None, count: int | None = None, pad: int = 0, shared: int = 0
) -> Batch:
    """Left-pads `rows` to `length` slots (default: the bucket of the longest) and to `count` rows.

    A row added to reach `count` is padding from end to end. All rows begin with the same `shared` tokens; the
    bucket is that of the others. Raises ValueError where a row does not fit.
    """
    longest = max((len(row.ids) for row in rows), default=1)
    length = shared + bucket(max(longest - shared, SHORTEST)) if length is None else length
    count = len(rows) if count is None else count
    if longest > length or len(rows) > count:
        raise ValueError(f"{len(rows)} rows of up to {longest} tokens do not fit {count} rows of {length}")
    tokens: Any = np.full((count, length), pad, np.int32)
    valid: Any = np.zeros((count, length), bool)
    ends: Any = np.full(count, length - 1, np.int32)
    for i, row in enumerate(rows):
        start = length - len(row.ids)
        tokens[i, start:], valid[i, start:], ends[i] = row.ids, True, start + row.instruction_end
    return Batch(tokens, valid, ends, shared)


def group_by_length(lengths: Sequence[int], batch_size: int, least: int = 0) -> list[np.ndarray]:
    """Indices of the rows of each batch: longest first, one length bucket a batch, at most `batch_size` rows.

    A batch of fewer than `least` rows takes shorter rows, too, down to half its slots. The longest come first so that
    a batch that does not fit memory is met at the start.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        size = len(groups[-1]) if groups else batch_size
        slots, own = bucket(lengths[groups[-1][0]]) if groups else 0, bucket(lengths[i])
        if size < batch_size and (slots == own or (size < least and slots <= 2 * own)):
            groups[-1].append(i)
        else:
            groups.append([i])
    return [np.array(group) for group in groups]


def row_bucket(n: int, batch_size: int, multiple: int = 1) -> int:
    """The number of rows that a batch of `n` is padded to: a power of two times `multiple`, at most `batch_size`."""
    size = multiple
    while size < n:
        size *= 2
    return min(size, -(-batch_size // multiple) * multiple)


Call = Callable[[Batch, np.ndarray], Tree]
"""(batch, indices int [B] of its rows, -1 for padding) -> a tree of arrays with leading axis B"""


def run_batches(call: Call, rows: Sequence[Row], batch_size: int, multiple: int = 1) -> Iterator[tuple[Any, Tree]]:
    """`call(batch, indices)` over batches of `rows` formed by length, as (indices, result) of each finished batch.

    The yielded indices, int [n], are those of the rows that the batch holds, without padding, and the results numpy
    arrays of leading axis n. The number of rows of a batch is a multiple of `multiple`, the number of devices that
    share them. A batch that does not fit memory is halved and tried again. `batch.shared` counts the tokens that all
    of `rows` begin with. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("there are no rows to run; give at least one prompt")
    shared = shared_tokens(rows)
    # Batches are at least half full where they can be: a few rows cost a program, and passes, of their own.
    lengths = [max(len(row.ids) - shared, SHORTEST) for row in rows]
    queue = group_by_length(lengths, batch_size, least=(batch_size + 1) // 2)[::-1]
    while queue:
        indices = queue.pop()
        count = row_bucket(len(indices), batch_size, multiple)
        padded = np.concatenate([indices, np.full(count - len(indices), -1)])
        try:
            result = fetch(call(pad_rows([rows[i] for i in indices], count=count, shared=shared), padded))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or len(indices) <= multiple:
                raise
            batch_size = max(multiple, len(indices) // 2)
            queue.append(indices)
            queue = [part for group in queue for part in _split(group, batch_size)]
            continue
        yield indices, _first(result, len(indices))


def reported(pieces: Iterable[tuple[Any, Any]], done: Progress) -> Iterator[tuple[Any, Any]]:
    """The (indices, result) pairs of `pieces`; `done` is called with the number of indices of each."""
    for indices, result in pieces:
        done(len(indices))
        yield indices, result


def in_order(pieces: Iterable[tuple[Any, Tree]]) -> Tree:
    """One tree of the results of (indices, result) pairs, in the order of the indices. Raises ValueError for none."""
    indices, results = zip(*pieces, strict=True)
    order = np.argsort(np.concatenate(indices))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[order], *results)


def _first(tree: Tree, n: int) -> Tree:
    return jax.tree.map(lambda a: a[:n], tree)


def _split(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def check_context(
    rows: Sequence[Row], context: int, new_tokens: int = 0, name: str = "", texts: Sequence[str] = ()
) -> None:
    """Raises ValueError naming the first row whose tokens and `new_tokens` exceed `context`.

    `name` is that of what the rows are of, which then are counted from 1 as those of a file; `texts` is what they say.
    """
    for i, row in enumerate(rows):
        if len(row.ids) + new_tokens > context:
            need = f"{len(row.ids)} tokens" + (f" + {new_tokens} new ones" if new_tokens else "")
            words = f" ({textwrap.shorten(texts[i], 60, placeholder=' ...')!r})" if texts else ""
            which = f"prompt {i + 1} of {name}" if name else f"prompt {i}"
            raise ValueError(f"{which}{words} needs {need}; the model's context is {context} tokens")


def data_sha256(rows: Sequence[Row]) -> str:
    """Digest of the rows, in their order."""
    content = [[list(map(int, row.ids)), row.instruction_end] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def answer_slots(rows: Sequence[Row], indices: Iterable[int]) -> int:
    """The most tokens that any of the rows of these indices holds behind its instruction's end; -1 names no row."""
    return max((len(rows[i].ids) - 1 - rows[i].instruction_end for i in indices if i >= 0), default=0)


def slots_of(rows: Sequence[Row]) -> tuple[int, int]:
    """The shape that batches of these rows take (see `FineTuning.slots`): slots, and slots of the answer."""
    return max(len(row.ids) for row in rows), answer_slots(rows, range(len(rows)))
