"""What a point does to a model: refusals of harmful and harmless prompts, and whether it still writes language."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsafe.evaluation.attack_settings import Setting, answers, records, score, under
from jaxsafe.evaluation.comparison import Sample
from jaxsafe.evaluation.fluency import answer_perplexity, answer_rows, repetition
from jaxsafe.evaluation.judges import Judge
from jaxsafe.evaluation.metrics import mcnemar, rate
from jaxsafe.evaluation.utilisation import Tokens
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.methods.statistics import data_sha256
from jaxsafe.text.batches import Row
from jaxsafe.text.datasets import PromptSet

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Examination:
    """What every point is put to.

    harmful: prompts asked under every one of `settings`, the first of which answers are compared under; harmless:
    prompts asked under the first; texts: rows for perplexity, whose answers are scored.
    """

    harmful: Sequence[PromptSet]
    harmless: Sequence[PromptSet]
    settings: tuple[Setting, ...]
    judge: Judge
    texts: Sequence[Row]
    max_new_tokens: int = 64
    fluency_answers: int = 100
    batch_size: int = 32
    seed: int = 0

    @property
    def size(self) -> int:
        """How many answers a point gives."""
        harmful = sum(map(len, self.harmful)) * sum(s.width for s in self.settings)
        return harmful + sum(map(len, self.harmless))

    @property
    def content(self) -> list[Any]:
        """What results depend on besides the model, in values of JSON, for a digest."""
        return [
            data_sha256(self.texts),
            [s.sha256 for s in (*self.harmful, *self.harmless)],
            [dataclasses.asdict(s) for s in self.settings],
            [self.judge.name, self.judge.version, self.max_new_tokens, self.fluency_answers, self.seed],
        ]


def examine(
    model: ChatModel, reference: ChatModel, exam: Examination, done: Progress = lambda n: None
) -> tuple[dict[str, Any], list[Sample]]:
    """Metrics, perplexity and fluency of `model`, and its answers as samples.

    `reference` is the model before any edit, which judges how likely the answers are. ASR and refusal rates carry
    the judge in their names.
    """
    metrics: dict[str, Any] = {}
    samples: list[Sample] = []

    def ask(prompts: PromptSet, setting: Setting) -> list[list[str]]:
        found = answers(model, prompts.prompts, setting, exam.max_new_tokens, exam.batch_size, exam.seed, done)
        samples.extend(records(prompts, found, setting, exam.judge))
        return found

    for setting in exam.settings:
        metrics |= score([texts for prompts in exam.harmful for texts in ask(prompts, setting)], setting, exam.judge)
    first = exam.settings[0]
    for prompts in exam.harmless:
        refused = [exam.judge.refused(texts[0]) for texts in ask(prompts, first)]
        metrics[f"refusal_{exam.judge.name}/{prompts.name.removeprefix('builtin:')}"] = rate(refused).as_dict()
    told = [s for s in samples if s["setting"] == first.name and s["text"].strip()]
    some = told[:: max(1, len(told) // exam.fluency_answers)][: exam.fluency_answers]
    asked = [first.texts(s["prompt"])[0] for s in some]
    rows = answer_rows(under(reference, first), asked, [s["text"] for s in some])
    perplexity, n_tokens = answer_perplexity(model, exam.texts, exam.batch_size)
    result = {
        "metrics": metrics,
        "perplexity": perplexity,
        "perplexity_tokens": n_tokens,
        "fluency": {
            "repetition": repetition([s["text"] for s in told]),
            "answer_perplexity": answer_perplexity(reference, rows, exam.batch_size)[0] if rows else None,
        },
    }
    return result, samples


def tokens_of(model: ChatModel, exam: Examination, samples: Sequence[Sample]) -> Tokens:
    """What an examination that gave `samples` went over; answers count as their text is tokenised again."""

    def read(prompts: PromptSet, setting: Setting) -> int:
        texts = [text for prompt in prompts.prompts for text in setting.texts(prompt)]
        return setting.samples * sum(len(row.ids) for row in under(model, setting).rows(texts))

    asked = [(prompts, setting) for setting in exam.settings for prompts in exam.harmful]
    asked += [(prompts, exam.settings[0]) for prompts in exam.harmless]
    texts = sum(len(row.ids) for row in exam.texts)
    written = sum(len(model.tokenizer.plain_ids(s["text"])) for s in samples)
    return Tokens(read=texts + sum(read(*each) for each in asked), written=written)


def refusals(samples: Sequence[Mapping[str, Any]], setting: Setting) -> list[bool | None]:
    """Whether each harmful prompt was refused under `setting`: each of its answers, in order."""
    return [s["refused"] for s in samples if s["setting"] == setting.name and s["harmful"] is not False]


def against(before: Sequence[bool | None], after: Sequence[bool | None]) -> dict[str, Any]:
    """Refusals of the same prompts by two models: the exact McNemar test and what changed."""
    test = mcnemar(before, after)
    return {
        "p_value": test.p_value,
        "stopped_refusing": test.fixed,
        "started_refusing": test.broken,
        "n": test.n,
        "n_unscored": test.n_unscored,
    }
