"""The record of a study: its table with comparisons, and the files that every run leaves."""

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np

import jaxsafe
from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.samples import comparisons, rates, set_name
from jaxsafe.io.atomic import write_text
from jaxsafe.io.hub import commit
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import (
    Comparison,
    Data,
    Environment,
    Json,
    JudgeVersion,
    Model,
    Rate,
    Run,
    TableRow,
    from_json,
    plain,
    to_json,
    written,
)
from jaxsafe.report.write import write_report
from jaxsafe.study.study import Examined, Study

LIBRARIES = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")
"""What a run's numbers depend on besides jaxsafe."""


def record(
    study: Study,
    task: str,
    config: Mapping[str, Json] | None = None,
    datasets: Sequence[Data] = (),
    details: object = None,
) -> Run:
    """The run of what `study` examined, as its file holds it; `details` is the record of what is the task's own."""
    judge, broken = study.exam.judge, study.exam.broken
    run = Run(
        task,
        environment(),
        model_record(study.model),
        JudgeVersion(judge.name, judge.version),
        JudgeVersion(broken.name, broken.version),
        study.exam.decoding.max_new_tokens,
        study.exam.decoding.seed,
        dict(config or {}),
        tuple(datasets),
        tuple(examined.result for examined in study.examined.values()),
        table(study),
        details={} if details is None else plain(details),
    )
    return from_json(plain(run), Run)


def write_run(out: str | os.PathLike, run: Run, study: Study) -> None:
    """Writes samples.jsonl, run.json and the report with its tables, each file whole or not at all."""
    folder = pathlib.Path(out)
    write_text(folder / "samples.jsonl", "".join(written(examined.samples) for examined in study.examined.values()))
    write_text(folder / "run.json", to_json(run, indent=1) + "\n")
    write_report(folder)


def table(study: Study) -> tuple[TableRow, ...]:
    """A row a group of variants, in the order in which they were examined."""
    groups: dict[str, list[Examined]] = {}
    for examined in study.examined.values():
        groups.setdefault(examined.result.variant.of, []).append(examined)
    of = {name: examined.result.variant.of for name, examined in study.examined.items()}
    return tuple(_row(name, groups, of) for name in groups)


def _row(name: str, groups: Mapping[str, Sequence[Examined]], of: Mapping[str, str]) -> TableRow:
    """The row of the group `name`; `of` names the group of each variant."""
    mine = groups[name]
    first, results = mine[0].result.variant, [examined.result for examined in mine]

    def against(variant: str | None) -> tuple[str | None, tuple[Comparison, ...]]:
        group = of.get(variant or "")
        if group is None:
            return None, ()
        seeds = [[examined.samples for examined in those] for those in (groups[group], mine)]
        return group, comparisons(seeds[0], seeds[1], (group, name), mine[0].exam.settings[0])

    (baseline, to_baseline), (control, to_control) = against(first.baseline), against(first.control)
    return TableRow(
        name,
        tuple(r.variant.name for r in results),
        {key: value for key, value in first.about.items() if key != "seed" or len(results) == 1},
        _rates(mine),
        {rate: tuple(r.rates[rate].value for r in results) for rate in results[0].rates},
        _mean([r.perplexity for r in results]),
        _mean([r.answer_perplexity for r in results]),
        _mean([r.repetition for r in results]),
        baseline,
        control,
        to_baseline,
        to_control,
    )


def _rates(seeds: Sequence[Examined]) -> dict[str, Rate]:
    """The rates of a group; of several seeds those that follow from answers are pooled, others averaged."""
    results, exam = [examined.result for examined in seeds], seeds[0].exam
    if len(seeds) == 1:
        return results[0].rates
    averaged = {
        name: Rate(_mean([result.rates[name].value for result in results]), None, None, rate.n)
        for name, rate in results[0].rates.items()
    }
    return averaged | rates([examined.samples for examined in seeds], exam.settings, exam.judge.name)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def environment() -> Environment:
    """Versions, revision, date, devices and the command line."""
    device = jax.devices()[0]
    return Environment(
        jaxsafe.__version__,
        jax.__version__,
        git_revision(),
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        {name: importlib.metadata.version(name) for name in LIBRARIES},
        shlex.join(sys.orig_argv),
    )


def git_revision() -> str | None:
    """The commit of the source tree, with "+" where it has changes; None outside a repository."""
    folder = pathlib.Path(jaxsafe.__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A clone of something else around an installed copy says nothing about it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def model_record(model: ChatModel) -> Model:
    """Which model a run used."""
    shape = model.config
    sha256, weights = model.config_sha256(), model.fingerprint()
    revision = commit(model.tokenizer.path)
    how = model.template_sha256, revision, model.adapter_sha256
    return Model(model.name, sha256, weights, shape.dtype, shape.layers, *how)


def data_records(sets: Mapping[str, Sequence[PromptSet]]) -> list[Data]:
    """Which prompts a run used, by what for."""
    return [
        Data(set_name(prompts), prompts.sha256, len(prompts), prompts.split, role)
        for role, those in sets.items()
        for prompts in those
    ]


def timed(run: Run, timings: Mapping[str, Json], files: Mapping[str, str]) -> Run:
    """`run` with how long its stages took, and further files of its folder."""
    return dataclasses.replace(run, timings=plain(dict(timings)), files=dict(files))
