"""A study: named variants of one model, put to one exam. What is finished is read instead of made."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence

from jaxsafe.chat.examinee import Examinee
from jaxsafe.chat.model import ChatModel
from jaxsafe.digest import digest
from jaxsafe.evaluation.utilisation import Tokens
from jaxsafe.io.store import Store
from jaxsafe.progress import Watch, unwatched
from jaxsafe.records.run import Json, Result, Sample, Variant, from_json, plain
from jaxsafe.study.exam import Exam, Findings, examine


@dataclasses.dataclass(frozen=True)
class Examined:
    """A variant's result, its answers, and the exam that gave them."""

    result: Result
    samples: tuple[Sample, ...]
    exam: Exam


@dataclasses.dataclass
class Study:
    """Variants of `model` put to `exam`, in the folder `out`.

    `watch` shows how far an exam is. `examined` fills up by variant, in the order in which variants are examined;
    `tokens` are those that exams took.
    """

    out: str | os.PathLike
    model: ChatModel
    exam: Exam
    watch: Watch = unwatched
    examined: dict[str, Examined] = dataclasses.field(default_factory=dict)
    tokens: list[Tokens] = dataclasses.field(default_factory=list)

    @property
    def store(self) -> Store:
        """Where finished pieces lie."""
        return Store(pathlib.Path(self.out) / "store")

    @functools.cached_property
    def identity(self) -> Json:
        """What every result follows from besides its variant. Raises ValueError as `Exam.identity` does."""
        return self.exam.identity(self.model)

    def check(self) -> None:
        """Raises ValueError, before any work, for what the model cannot be asked."""
        _ = self.identity

    def under(self, exam: Exam) -> "Study":
        """This study with another exam; both fill the same results."""
        return dataclasses.replace(self, exam=exam)

    def has(self, variant: Variant) -> bool:
        """Whether the result of `variant` is finished."""
        return self.store.has("result", self._follows(variant))

    def finished(self, variant: Variant) -> bool:
        """Whether the result of `variant` is finished; a finished one takes its place among the examined."""
        if not self.has(variant):
            return False
        kept = from_json(self.store.read("result", self._follows(variant)), Kept)
        samples = tuple(dataclasses.replace(sample, variant=variant.name) for sample in kept.samples)
        self.examined[variant.name] = Examined(dataclasses.replace(kept.result, variant=variant), samples, self.exam)
        return True

    def key(self, variant: Variant) -> str:
        """The digest of all that the result of `variant` follows from."""
        return digest(self._follows(variant))

    def examine(self, variant: Variant, make: ChatModel | Callable[[], ChatModel | Examinee]) -> Result:
        """The result of `variant`: the stored one, or that of the model, which is made only if it is needed."""
        return self.examine_together([variant], lambda: _steered(make))[0]

    def examine_together(self, variants: Sequence[Variant], make: Callable[[], Examinee]) -> list[Result]:
        """The results of variants that are steerings of one model, whose answers come from one prefill.

        Raises ValueError where a name was given to another variant before.
        """
        named = {name: examined.result.variant for name, examined in self.examined.items()}
        for variant in variants:
            if named.setdefault(variant.name, variant) != variant:
                raise ValueError(f"two variants are named {variant.name!r}; give each a name of its own")
        if not all(map(self.has, variants)):
            self._make(variants, make())
        for variant in variants:
            self.finished(variant)
        return [self.examined[variant.name].result for variant in variants]

    def _make(self, variants: Sequence[Variant], examinee: Examinee) -> None:
        names = [variant.name for variant in variants]
        together = [self._follows(variant) for variant in variants]
        log = self.store.log("answers", together)
        with self.watch(names[-1], self.exam.pieces * len(names)) as done:
            findings, tokens = examine(examinee, self.model, self.exam, names, log, done)
        self.tokens.append(tokens)
        for variant, follows, found in zip(variants, together, findings, strict=True):
            self.store.write("result", follows, plain(Kept(_result(variant, self.key(variant), found), found.samples)))
        self.store.drop("answers", together, ".jsonl")

    def _follows(self, variant: Variant) -> Json:
        return [self.identity, variant.follows]


@dataclasses.dataclass(frozen=True)
class Kept:
    """A result as the store holds it, with its answers."""

    result: Result
    samples: tuple[Sample, ...]


def _steered(make: ChatModel | Callable[[], ChatModel | Examinee]) -> Examinee:
    made = make if isinstance(make, ChatModel) else make()
    return made.steered([None]) if isinstance(made, ChatModel) else made


def _result(variant: Variant, key: str, found: Findings) -> Result:
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "samples"}
    return Result(variant, key, **fields)
