"""`run.json` is a `Run`, each line of `samples.jsonl` a `Sample`.

An answer has one of three outcomes: it refuses, it complies, or it is broken (see `evaluation/judges/broken.py`). A
refusal rate and an attack success rate (ASR) are shares of scored answers; perplexities are exp of nats a token.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from jaxsafe.reading import reading

SCHEMA = 3

Json = Any
"""None, booleans, numbers, strings, and lists and string-keyed mappings of them."""
Outcome = Literal["refused", "complied", "broken"]


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share with its 95% interval.

    value, ci_low, ci_high: in [0, 1], None where nothing was scored; n: answers scored; n_unscored: others.
    """

    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    n_unscored: int = 0


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way in which a model differs, and what it is held against on the same prompts.

    name: tells it from every other variant of a study; follows: what its result follows from besides the model and
    the exam, in values of JSON; baseline, control: names of the variant that it is held against and of its random
    control of the same size; group: what variants that differ by seed alone share (the name where it is ""); about:
    its columns in the table.
    """

    name: str
    follows: Json = None
    baseline: str | None = None
    control: str | None = None
    group: str = ""
    about: dict[str, Json] = dataclasses.field(default_factory=dict)

    @property
    def of(self) -> str:
        """The name of its group."""
        return self.group or self.name


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer.

    set, kind, harmful: of the prompt, "" and None where there is none; setting: how it was asked; refused: the verdict
    of the judge of refusals alone, None where it cannot score the answer; suffix, sample: which of several answers to
    the prompt; score, steered_as_harmful: what a steering rule reads at the prompt and decides by it; nats: a token of
    the answer under the unedited model, None where it was not read; broken: whether the answer is (see `BrokenJudge`);
    passes: how often the prompt was answered, more than once where a refusal was mended.
    """

    variant: str
    set: str
    setting: str
    harmful: bool | None
    kind: str
    prompt: str
    text: str
    refused: bool | None
    suffix: int | None = None
    sample: int = 0
    score: float | None = None
    steered_as_harmful: bool | None = None
    nats: float | None = None
    broken: bool = False
    passes: int = 1

    @property
    def outcome(self) -> Outcome | None:
        """What the answer comes to, None where the judge cannot score a whole one."""
        return outcome(self.refused, self.broken)


def outcome(refused: bool | None, broken: bool) -> Outcome | None:
    """What an answer comes to by the verdict of a judge of refusals, and by whether it is broken."""
    if broken:
        return "broken"
    return None if refused is None else "refused" if refused else "complied"


@dataclasses.dataclass(frozen=True)
class Result:
    """What an exam finds of one variant.

    key: digest of everything that it follows from; rates: by name, see `evaluation.samples.rates`, and further ones of
    optional tasks; perplexity: of given texts, over `perplexity_tokens` tokens; answer_perplexity: of its answers
    under the unedited model; repetition: the share of repeated four-grams. None where it was not measured or is not
    finite.
    """

    variant: Variant
    key: str
    rates: dict[str, Rate]
    perplexity: float | None = None
    perplexity_tokens: int = 0
    answer_perplexity: float | None = None
    repetition: float | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """By how much a share grows, with its 95% interval; None where one side has no scored answer."""

    value: float | None
    ci_low: float | None
    ci_high: float | None


@dataclasses.dataclass(frozen=True)
class KindRates:
    """Refusals of one kind of prompt by two groups of variants."""

    kind: str
    first: Rate
    second: Rate


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Refusals of the same prompts by two groups of variants, under the first setting.

    label: of the prompts, as in tables; set: None for those of all sets together; p_value: the exact McNemar test,
    None where a group has several seeds; stopped_refusing, started_refusing: answers whose verdict changes from first
    to second; n, n_unscored: pairs scored on both sides, and others; difference: second less first; first_broken,
    second_broken: shares of broken answers, which do not refuse; complied, complied_p_value: as difference and p_value,
    of the answers that comply, which on harmful prompts is attack success.
    """

    first: str
    second: str
    label: str
    set: str | None
    harmful: bool | None
    first_rate: Rate
    second_rate: Rate
    difference: Difference
    p_value: float | None
    stopped_refusing: int
    started_refusing: int
    n: int
    n_unscored: int
    first_broken: Rate
    second_broken: Rate
    complied: Difference
    complied_p_value: float | None
    by_kind: tuple[KindRates, ...] = ()


@dataclasses.dataclass(frozen=True)
class TableRow:
    """What a group of variants, which differ by seed alone, comes to.

    rates: pooled over seeds, intervals over prompts and seeds; seeds: each rate by seed; perplexity, answer_perplexity,
    repetition: means over seeds; baseline, control: names of groups; against_baseline, against_control: comparisons
    with them, first the baseline or control, second this group.
    """

    group: str
    variants: tuple[str, ...]
    about: dict[str, Json]
    rates: dict[str, Rate]
    seeds: dict[str, tuple[float | None, ...]]
    perplexity: float | None
    answer_perplexity: float | None
    repetition: float | None
    baseline: str | None = None
    control: str | None = None
    against_baseline: tuple[Comparison, ...] = ()
    against_control: tuple[Comparison, ...] = ()


@dataclasses.dataclass(frozen=True)
class Environment:
    """Versions, revision of the source, date and devices.

    versions: of the libraries that numbers depend on; command: the line that started the run.
    """

    jaxsafe: str
    jax: str
    git: str | None
    date: str
    device: str
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Model:
    """Which model it was; sha256: of its configuration, fingerprint: of its weights and how it is asked.

    revision: the commit of the hub's repository that it came from, None for a folder or a file; adapter_sha256: of an
    adapter merged into it.
    """

    name: str
    sha256: str
    fingerprint: str
    dtype: str
    layers: int
    template_sha256: str | None = None
    revision: str | None = None
    adapter_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class JudgeVersion:
    """Which rule judged answers."""

    name: str
    version: str


@dataclasses.dataclass(frozen=True)
class Data:
    """Which prompts a run used, and for what."""

    name: str
    sha256: str
    n: int
    split: str | None
    role: str


@dataclasses.dataclass(frozen=True)
class Scored:
    """What became of the prompts of a side ("safety", "utility") whose own answers scores are made from.

    prompts: how many were answered; kept: those whose answer refuses (safety) or does not (utility) by the rule
    `judge`; used: how many of these scores are of.
    """

    side: str
    prompts: int
    kept: int
    used: int
    judge: str

    @property
    def dropped(self) -> int:
        """How many prompts were left out for their answer."""
        return self.prompts - self.kept


@dataclasses.dataclass(frozen=True)
class PublishedRate:
    """One number of a paper, by the names of the run's own table.

    group: of variants; rate: its name among theirs; value: in [0, 1].
    """

    group: str
    rate: str
    value: float


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """A table of a paper; source: which one; tasks: those that its zero-shot accuracy is the mean of."""

    source: str
    rates: tuple[PublishedRate, ...]
    tasks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: named variants of one model put to one exam.

    judge, broken_judge: what told refusals and broken answers; new_tokens: how long an answer may be; scored: of the
    sides that own answers were made for; published: what a paper gives for these variants; details: what is the task's
    own, a type of `jaxsafe.records.<task>` in values of JSON, empty for others.
    """

    task: str
    environment: Environment
    model: Model
    judge: JudgeVersion
    broken_judge: JudgeVersion
    new_tokens: int
    seed: int
    config: dict[str, Json]
    datasets: tuple[Data, ...]
    results: tuple[Result, ...]
    table: tuple[TableRow, ...]
    timings: dict[str, Json] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    details: dict[str, Json] = dataclasses.field(default_factory=dict)
    scored: tuple[Scored, ...] = ()
    published: tuple[PublishedTable, ...] = ()
    schema: int = SCHEMA

    def row(self, group: str) -> TableRow:
        """The row of a group. Raises KeyError where there is none."""
        return {row.group: row for row in self.table}[group]


def read_run(folder: str | os.PathLike) -> Run:
    """The run in `folder`.

    Raises FileNotFoundError, and ValueError for what is no run of this schema, with one line that says where.
    """
    path = pathlib.Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the folder of a finished run")
    with reading(path, "is no run"):
        schema = msgspec.json.decode(path.read_bytes(), type=dict).get("schema")
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema {schema!r}; this version reads schema {SCHEMA}: run it anew")
        return msgspec.json.decode(path.read_bytes(), type=Run)


def read_samples(folder: str | os.PathLike) -> list[Sample]:
    """The samples in `folder`, none where it has no samples.jsonl. Raises ValueError for a line that is none."""
    path = pathlib.Path(folder) / "samples.jsonl"
    if not path.is_file():
        return []
    decoder, found = msgspec.json.Decoder(Sample), []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        with reading(f"{path}, line {number},", "is no sample"):
            found += [decoder.decode(line)] if line.strip() else []
    return found


def to_json(value: Any, indent: int = 0) -> str:
    """A record as JSON; numbers that are not finite become null."""
    text = _encoded(value)
    return (msgspec.json.format(text, indent=indent) if indent else text).decode()


def from_json(value: Json, kind: type) -> Any:
    """The record of type `kind` that `value` holds. Raises ValueError where it holds none."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"these details are no {kind.__name__}: {error}") from None


def plain(value: Any) -> Json:
    """`value` in values of JSON: records as mappings, arrays as lists, what is not finite as None."""
    return msgspec.json.decode(_encoded(value))


def _encoded(value: Any) -> bytes:
    """`value` as JSON; in place of a surrogate without its other half, which UTF-8 cannot hold, stands U+FFFD."""
    try:
        return msgspec.json.encode(value, enc_hook=_as_list)
    except UnicodeEncodeError:
        return msgspec.json.encode(_encodable(msgspec.to_builtins(value, enc_hook=_as_list)))


def _encodable(value: Json) -> Json:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(entry) for key, entry in value.items()}
    return [_encodable(entry) for entry in value] if isinstance(value, list | tuple) else value


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no value of JSON")


@functools.cache
def json_schema() -> dict[str, Json]:
    """JSON schema of a `Run` and of a `Sample`, {"run", "sample"}, as in schema.json beside this file."""
    return {"run": msgspec.json.schema(Run), "sample": msgspec.json.schema(Sample)}


def written(samples: Sequence[Sample]) -> str:
    """The text of samples.jsonl."""
    return "".join(to_json(sample) + "\n" for sample in samples)
