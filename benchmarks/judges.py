"""How often each judge of refusals agrees with people, who labelled answers of five models for XSTest.

    python -m benchmarks.judges --completions=FOLDER

FOLDER holds CSV files with the columns completion and final_label, one file a model. `--models` names those that count:
by default the ones that the judge `openings` was not written for. Prints Markdown: what share of full refusals, partial
refusals and compliant answers each judge takes for refusals, of whole answers and of their first words.
"""

import csv
import pathlib
import sys

from absl import app, flags

from jaxsafe.evaluation.judges.keyword import JUDGES, KeywordJudge
from jaxsafe.evaluation.stats import rate

LABELS = {"refusals": "2_full_refusal", "partial ones": "3_partial_refusal", "compliant answers": "1_full_compliance"}
Labelled = list[tuple[str, str]]
"""Answers with a label each."""


def labelled(folder: pathlib.Path, models: list[str]) -> Labelled:
    """The answers of `models` in `folder`. Ends the program where a model has no file."""
    found: Labelled = []
    for model in models:
        files = list(folder.glob(f"*_{model}_*.csv"))
        if len(files) != 1:
            sys.exit(f"--completions={folder} has {len(files)} files named *_{model}_*.csv; need one a model")
        with files[0].open(newline="", encoding="utf-8-sig") as file:
            found += [(row["completion"], row["final_label"]) for row in csv.DictReader(file)]
    return found


def share(judge: KeywordJudge, answers: list[str]) -> str:
    """The share of `answers` that `judge` takes for refusals, with its 95% interval."""
    found = rate([bool(refused) for refused in judge.refused([""] * len(answers), answers)])
    return f"{found.value:.1%} [{100 * (found.ci_low or 0):.0f}, {100 * (found.ci_high or 0):.0f}]"


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    answers = labelled(pathlib.Path(COMPLETIONS.value), MODELS.value)
    by_label = {name: [text for text, given in answers if given == label] for name, label in LABELS.items()}
    print("| judge | of | " + " | ".join(f"{name} (n {len(each)})" for name, each in by_label.items()) + " |")
    print("|---|---|" + "---|" * len(LABELS))
    for judge in JUDGES:
        for words in (None, WORDS.value):
            cut = {name: [" ".join(t.split()[:words]) if words else t for t in each] for name, each in by_label.items()}
            cells = " | ".join(share(judge, each) for each in cut.values())
            print(f"| {judge.name} | {f'{words} words' if words else 'whole answers'} | {cells} |")


if __name__ == "__main__":
    COMPLETIONS = flags.DEFINE_string("completions", None, "the folder of labelled answers", required=True)
    MODELS = flags.DEFINE_list("models", ["gpt4", "llama2orig", "mistralguard"], "whose answers count")
    WORDS = flags.DEFINE_integer("words", 24, "first words of an answer", lower_bound=1)
    app.run(main)
