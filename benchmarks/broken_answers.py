"""How often whole answers count as broken: the false alarms of the rule behind the third outcome.

    python -m benchmarks.broken_answers --model=FOLDER --completions=FOLDER

The model reads its own greedy answers and its own samples at temperature 1 to the built-in calibration prompts, and the
answers of other models that people labelled for XSTest (a folder of CSV files with the columns prompt, completion and
final_label), cut to the length of its own; of those it is the answers labelled as full compliance that count. Prints
Markdown.
"""

import csv
import pathlib
from collections.abc import Sequence

from absl import app, flags

from jaxsafe.chat.model import ChatModel, load_chat_model
from jaxsafe.evaluation.judges.broken import BrokenJudge
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.evaluation.language import answer_rows
from jaxsafe.evaluation.stats import rate
from jaxsafe.kernels.sampling import Decoding, Sampling
from jaxsafe.prompts.sets import load_prompts
from jaxsafe.records.run import Rate

Pairs = Sequence[tuple[str, str]]
"""Prompts with an answer each."""


def false_alarms(model: ChatModel, pairs: Pairs) -> Rate:
    """The share of `pairs` whose answer counts as broken, with its 95% interval."""
    whole = [pair for pair in pairs if pair[1].strip()]
    prompts, answers = zip(*whole, strict=True)
    sums, counts = model.nll(answer_rows(model, prompts, answers), 32)
    refused = judge("scans").refused(prompts, answers)
    return rate(BrokenJudge().broken(answers, refused, (sums / counts).round(4).tolist()))


def own(model: ChatModel, tokens: int, temperature: float) -> Pairs:
    """The model's answers to the built-in calibration prompts."""
    sets = [load_prompts(f"builtin:{name}", split="calibration") for name in ("plain", "lookalike", "harmful")]
    prompts = [prompt for each in sets for prompt in each.prompts]
    answers = model.answers(prompts, Decoding(tokens, Sampling(temperature)), 32)
    return list(zip(prompts, answers.texts, strict=True))


def complied(folder: pathlib.Path, model: ChatModel, tokens: int) -> Pairs:
    """Answers that people found to comply fully, cut to `tokens` tokens."""
    rows = [row for file in sorted(folder.glob("*.csv")) for row in csv.DictReader(file.open(encoding="utf-8"))]
    kept = [(row["prompt"], row["completion"]) for row in rows if row["final_label"].startswith("1")]
    return [(prompt, model.tokenizer.hf.decode(model.tokenizer.plain_ids(text)[:tokens])) for prompt, text in kept]


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    model = load_chat_model(MODEL.value)
    found = {
        "its own greedy answers": own(model, TOKENS.value, 0.0),
        "its own samples at temperature 1": own(model, TOKENS.value, 1.0),
    }
    if COMPLETIONS.value:
        found["answers of other models that people found whole"] = complied(
            pathlib.Path(COMPLETIONS.value), model, TOKENS.value
        )
    print(f"Broken by rule {BrokenJudge().version}; {model.name}, {TOKENS.value} tokens an answer\n")
    print("| answers | n | broken |\n|---|---:|---|")
    for name, pairs in found.items():
        share = false_alarms(model, pairs)
        print(f"| {name} | {share.n} | {share.value:.1%} [{share.ci_low:.1%}, {share.ci_high:.1%}] |")


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "smollm2-135m-instruct", "a folder, a hub name, or smollm2-135m-instruct")
    COMPLETIONS = flags.DEFINE_string("completions", "", "folder of labelled answers; empty: the model's own alone")
    TOKENS = flags.DEFINE_integer("tokens", 32, "the most tokens of an answer")
    app.run(main)
