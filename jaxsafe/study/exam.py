"""An exam: prompts under settings, a judge, and texts to read. It turns a model into typed samples and rates."""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsafe.chat.answers import Answers
from jaxsafe.chat.examinee import Examinee
from jaxsafe.chat.model import ChatModel, System
from jaxsafe.evaluation.judges.broken import BrokenJudge
from jaxsafe.evaluation.judges.judge import Judge
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.evaluation.language import Likelihood, perplexity, repetition, row_likelihoods, spoken_rows
from jaxsafe.evaluation.samples import rates, set_name
from jaxsafe.evaluation.settings import Setting, setting
from jaxsafe.evaluation.utilisation import Tokens
from jaxsafe.evaluation.windows import Windows, read_by_rule
from jaxsafe.evaluation.zero_shot import LM_EVAL_03, Shuffled, zero_shot
from jaxsafe.io.store import Log, by_batch
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.progress import Progress, silent
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import Json, Rate, Sample
from jaxsafe.rows import Row, check_context, data_sha256

VANILLA, SCANS = setting("vanilla"), judge("scans")
Prompt = tuple[System, bool, str]
"""The system prompt, whether there is no template, and what answers begin with; see `ChatModel.with_prompt`."""


@dataclasses.dataclass(frozen=True)
class Exam:
    """What every variant is put to.

    prompts: sets of labelled prompts, asked under the first of `settings`, and those that are not safe under the
    others, too; judge: tells refusals; decoding: of answers (settings have temperatures and samples of their own);
    texts: rows whose answers perplexity is of; before: rows whose answers it is of, too, read before any steering
    acts; broken: tells broken answers, which the unedited model reads for it; tasks: of lm-eval, of whose questions
    `task_limit` are asked, as in `zero_shot`. Raises ValueError where the first setting
    gives several answers a prompt, where two settings have one name, and for no prompts.
    """

    prompts: tuple[PromptSet, ...]
    settings: tuple[Setting, ...] = (VANILLA,)
    judge: Judge = SCANS
    decoding: Decoding = Decoding()
    texts: tuple[Row, ...] = ()
    before: tuple[Row, ...] = ()
    broken: BrokenJudge = BrokenJudge()
    batch_size: int = 32
    tasks: tuple[str, ...] = ()
    task_limit: int | Shuffled | None = 200

    def __post_init__(self) -> None:
        if not self.settings or self.settings[0].width != 1:
            raise ValueError("an exam's settings must begin with one that gives one answer a prompt, such as 'vanilla'")
        names = [setting.name for setting in self.settings]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two settings are named {twice[0]!r}; give each a name of its own")
        if not sum(map(len, self.prompts)):
            raise ValueError("an exam has no prompts; name at least one set to evaluate")

    @property
    def questions(self) -> tuple["Question", ...]:
        """Every set of prompts with every setting that it is asked under."""
        first, *others = self.settings
        unsafe = [prompts.select([label is not False for label in prompts.harmful]) for prompts in self.prompts]
        asked = [Question(first, prompts) for prompts in self.prompts]
        return (*asked, *(Question(setting, prompts) for setting in others for prompts in unsafe if len(prompts)))

    @property
    def size(self) -> int:
        """How many answers one variant gives."""
        return sum(len(question.prompts) * question.setting.width for question in self.questions)

    @property
    def pieces(self) -> int:
        """How much there is to do for one variant: answers to give, the same to read, and texts to read."""
        return 2 * self.size + len(self.texts) + len(self.before)

    def identity(self, model: ChatModel) -> Json:
        """What results follow from besides the variant: `model`, what it is asked token by token, and how it is judged.

        Raises ValueError for a prompt or a text beyond the model's context.
        """
        asked = [question.rows(model) for question in self.questions]
        for question, rows in zip(self.questions, asked, strict=True):
            name = f"{set_name(question.prompts)} under {question.setting.name!r}"
            check_context(rows, model.config.context, self.decoding.max_new_tokens, name, question.texts)
        check_context((*self.texts, *self.before), model.config.context, name="the passages to read")
        settings = [question.setting.drawn for question in self.questions]
        sampling = [float(value) for value in dataclasses.astuple(self.decoding.sampling)]
        limit = [self.task_limit.limit, LM_EVAL_03] if isinstance(self.task_limit, Shuffled) else [self.task_limit]
        return {
            "model": model.fingerprint(),
            "asked": [data_sha256(rows) for rows in asked],
            "labels": [[q.setting.name, set_name(q.prompts), q.prompts.sha256] for q in self.questions],
            "ends": list(self.decoding.eos or model.tokenizer.eos_ids),
            "decoding": [self.decoding.max_new_tokens, self.decoding.seed, sampling, settings],
            "judge": [self.judge.name, self.judge.version],
            "texts": [data_sha256(self.texts), data_sha256(self.before)],
            "broken": self.broken.version,
            "tasks": [list(self.tasks), *limit],
        }


@dataclasses.dataclass(frozen=True)
class Question:
    """A set of prompts under one setting."""

    setting: Setting
    prompts: PromptSet

    def prompt(self, model: ChatModel) -> Prompt:
        """How `model` is asked."""
        return self.setting.system, model.raw or not self.setting.template, self.setting.opening or model.opening

    @property
    def texts(self) -> list[str]:
        """What stands for each prompt, as often as it is asked."""
        return [text for prompt in self.prompts.prompts for text in self.setting.texts(prompt)]

    def rows(self, model: ChatModel) -> list[Row]:
        """The texts as `model` is asked them."""
        return model.with_prompt(*self.prompt(model)).rows(self.texts)

    def decoding(self, decoding: Decoding) -> Decoding:
        """`decoding` with the samples, the temperature and the choice of tokens of the setting."""
        asked, own = self.setting, decoding.sampling
        sampling = own.replace(  # type: ignore[attr-defined]
            temperature=asked.temperature, top_k=asked.top_k or own.top_k, top_p=min(asked.top_p, own.top_p)
        )
        return dataclasses.replace(decoding, sampling=sampling, samples=asked.samples)

    def answered(self, model: ChatModel, answers: Sequence[Sequence["Answer"]]) -> list[Row]:
        """The `answers` [rule][answer] behind what `model` is asked, one rule after the other."""
        texts = [text for text in self.texts for _ in range(self.setting.samples)]
        asked = model.with_prompt(*self.prompt(model))
        return [row for each in answers for row in spoken_rows(asked, texts, [answer.text for answer in each])]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What an exam finds of one variant, as in `records.run.Result`, and its answers."""

    rates: dict[str, Rate]
    perplexity: float | None
    perplexity_tokens: int
    answer_perplexity: float | None
    repetition: float | None
    samples: tuple[Sample, ...]


def examine(
    examinee: Examinee,
    reference: ChatModel,
    exam: Exam,
    names: Sequence[str],
    log: Log | None = None,
    done: Progress = silent,
) -> tuple[tuple[Findings, ...], Tokens]:
    """What `exam` finds of every rule of `examinee`, and the tokens that it takes.

    `reference` is the model before any edit, which reads the answers; `names` are those of the variants, one a rule.
    Answers are kept in `log` batch by batch, and those that it holds are not made again; `done` is called with numbers
    of finished pieces, `exam.pieces` for each rule. Raises ValueError for tasks put to a steered model.
    """
    if exam.tasks and any(rule is not None for rule in examinee.rules):
        raise ValueError("zero-shot tasks are asked of models without a steering rule; leave the tasks out")
    samples: list[list[Sample]] = [[] for _ in names]
    likely: list[list[Likelihood]] = [[] for _ in names]
    tokens = Tokens(read=sum(len(names) * len(row.ids) for row in exam.texts) + sum(len(r.ids) for r in exam.before))
    questions = exam.questions
    by_question: list[list[list[Answer]]] = [[] for _ in questions]

    def for_all(n: int) -> None:
        done(n * len(names))

    for place in _places(log, questions, examinee.model):
        answers, taken = _answered(examinee, [questions[i] for i in place.numbers], exam, place, for_all)
        tokens += taken
        for i, first, stop in zip(place.numbers, place.bounds, place.bounds[1:], strict=False):
            by_question[i] = [[by_rule[rule] for by_rule in answers[first:stop]] for rule in range(len(names))]
    if examinee.model is not reference:
        by_question = [[[a._replace(nats=None) for a in each] for each in by_rule] for by_rule in by_question]
    read_by_question = _read(reference, questions, by_question, exam.batch_size, done)
    for question, by_name, read in zip(questions, by_question, read_by_question, strict=True):
        for rule, found in enumerate(read):
            samples[rule] += _samples(names[rule], question, exam, by_name[rule], found)
            likely[rule] += found if question.setting == exam.settings[0] else []
    texts = Windows(exam.texts, exam.before)
    passages = read_by_rule(examinee, texts, exam.batch_size, for_all) if exam.texts else [None] * len(names)
    findings = []
    for rule, nll in enumerate(passages):
        value, n = (None, 0) if nll is None else perplexity(*nll)
        own = [s for s in samples[rule] if s.setting == exam.settings[0].name and s.text.strip()]
        named = rates([samples[rule]], exam.settings, exam.judge.name) | _tasks(examinee.model, exam)
        fluency = perplexity(*np.array(likely[rule]).T)[0], repetition([s.text for s in own])
        findings.append(Findings(named, value, n, *fluency, tuple(samples[rule])))
    return tuple(findings), tokens


class Answer(NamedTuple):
    """An answer, and what a steering rule reads at its prompt and decides by it, None without a rule.

    passes: how often the prompt was answered; nats: the summed negative log-likelihood of the answer under the unedited
    model, where that gave it and its text is that of the tokens alone; None where it is to be read.
    """

    text: str
    score: float | None
    steered_as_harmful: bool | None
    passes: int = 1
    nats: float | None = None


class Place(NamedTuple):
    """The log of the answers to some questions that are asked together, in the log of the whole exam.

    numbers: those of the questions there; bounds: where the answers to each begin among all of these, and where they
    end; found: the answers that the log holds, by their place among all of these.
    """

    log: Log | None
    numbers: tuple[int, ...]
    bounds: tuple[int, ...]
    found: tuple[tuple[int, Json], ...]

    def entries(self) -> list[Json]:
        """(index, answer by rule) of the answers that the log holds."""
        return list(self.found)

    def add(self, *entries: Json) -> None:
        """Adds the answers of a batch."""
        if self.log is not None:
            which = [bisect.bisect_right(self.bounds, index) - 1 for index, _ in entries]
            own = zip(which, entries, strict=True)
            self.log.add(*([self.numbers[k], index - self.bounds[k], answers] for k, (index, answers) in own))


def _places(log: Log | None, questions: Sequence[Question], model: ChatModel) -> list[Place]:
    """The places of questions that are asked together, which fill each other's batches; the log is read once.

    Those are asked together that are asked in one way and answered greedily: of what is drawn, which one an answer is
    follows from equal prompts before it.
    """
    found: list[list[tuple[int, Json]]] = [[] for _ in questions]
    for number, index, answers in [] if log is None else log.entries():
        found[number].append((index, answers))
    alike: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        drawn = question.setting.temperature or question.setting.samples > 1
        alike.setdefault((question.prompt(model), number if drawn else None), []).append(number)
    places = []
    for numbers in alike.values():
        sizes = [len(questions[i].prompts) * questions[i].setting.width for i in numbers]
        bounds = tuple(itertools.accumulate(sizes, initial=0))
        kept = [(start + i, each) for number, start in zip(numbers, bounds, strict=False) for i, each in found[number]]
        if questions[numbers[0]].setting.temperature and len(kept) < bounds[-1]:
            kept = []  # what is drawn is drawn together
        places.append(Place(log, tuple(numbers), bounds, tuple(kept)))
    return places


def _answered(
    examinee: Examinee, questions: Sequence[Question], exam: Exam, place: Place, done: Progress
) -> tuple[list[list[Answer]], Tokens]:
    """The answers to `questions` of one place, [answer][rule], and the tokens that they take; kept ones take none."""
    first, taken = questions[0], [Tokens()]
    texts, width = [text for question in questions for text in question.texts], first.setting.samples

    def make(left: list[int]) -> Iterator[tuple[list[int], list[Json]]]:
        asked = examinee.with_prompt(*first.prompt(examinee.model))
        some = [texts[i // width] for i in left[::width]]
        for rows, answers in asked.answer_batches(some, first.decoding(exam.decoding), exam.batch_size):
            taken.append(Tokens(read=answers[0].read, written=sum(each.written for each in answers)))
            yield [left[row] for row in rows], [_by_rule(examinee.model, answers, i) for i in range(len(rows))]

    found = by_batch(place.bounds[-1], make, place, done)
    return [[Answer(*each) for each in by_rule] for by_rule in found], sum(taken, Tokens())


def _read(
    model: ChatModel,
    questions: Sequence[Question],
    answers: Sequence[Sequence[Sequence[Answer]]],
    batch_size: int,
    done: Progress,
) -> list[list[list[Likelihood]]]:
    """How likely `answers` [question][rule][answer] are to `model`, which gave those with `nats`.

    Questions that are asked in one way are read together: they begin alike, and fill each other's batches.
    """
    places: dict[Prompt, list[int]] = {}
    for i, question in enumerate(questions):
        places.setdefault(question.prompt(model), []).append(i)
    out: list[list[list[Likelihood]]] = [[] for _ in questions]
    for alike in places.values():
        rows = [row for i in alike for row in questions[i].answered(model, answers[i])]
        given = [answer.nats for i in alike for each in answers[i] for answer in each]
        known = {
            row: Likelihood(nats, len(row.ids) - 1 - row.instruction_end)
            for row, nats in zip(rows, given, strict=True)
            if nats is not None
        }
        found = iter(row_likelihoods(model, rows, batch_size, done, known))
        for i in alike:
            out[i] = [list(itertools.islice(found, len(each))) for each in answers[i]]
    return out


def _by_rule(model: ChatModel, answers: Sequence[Answers], row: int) -> list[Answer]:
    def nats(each: Answers) -> float | None:
        text = each.texts[row]
        if each.nats is None or not text.strip():
            return None
        ids = each.tokens[row, : each.lengths[row]].tolist()
        return float(each.nats[row]) if model.tokenizer.plain_ids(text) == ids else None

    return [
        Answer(
            each.texts[row],
            None if each.scores is None else float(each.scores[row]),
            None if each.harmful is None else bool(each.harmful[row]),
            1 if each.passes is None else int(each.passes[row]),
            nats(each),
        )
        for each in answers
    ]


def _samples(
    name: str, question: Question, exam: Exam, answers: Sequence[Answer], likely: Sequence[Likelihood]
) -> list[Sample]:
    """The judged answers to `question`, in the order of its prompts."""
    prompts, setting = question.prompts, question.setting
    asked = [prompt for prompt in prompts.prompts for _ in range(setting.width)]
    texts, nats = [answer.text for answer in answers], [each.mean for each in likely]
    refused = exam.judge.refused(asked, texts)
    broken = exam.broken.broken(texts, refused, nats)
    return [
        Sample(
            name,
            set_name(prompts),
            setting.name,
            prompts.harmful[i // setting.width],
            prompts.kinds[i // setting.width],
            asked[i],
            answer.text,
            refused[i],
            i % setting.width if setting.suffixes else None,
            0 if setting.suffixes else i % setting.width,
            answer.score,
            answer.steered_as_harmful,
            nats[i],
            broken[i],
            answer.passes,
        )
        for i, answer in enumerate(answers)
    ]


def _tasks(model: ChatModel, exam: Exam) -> dict[str, Rate]:
    """Accuracies of lm-eval tasks, where the exam has some."""
    if not exam.tasks:
        return {}
    seed = exam.decoding.seed
    found = zero_shot(model, exam.tasks, exam.task_limit, exam.batch_size, seed)
    return {f"zero_shot/{task}": rate for task, rate in found.items()}
