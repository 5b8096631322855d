"""Which tables of the two papers can be made here: what each takes, before anything runs.

python -m launch.reproduce --list

names every table with its command, what you bring to it, and for one H100 and a v5e slice of eight chips the memory
and the roofline time. Nothing is loaded or compiled. Memory is that of weights, caches, scores, bases and training
state: temporaries, and a tree of edited weights, come on top. Times count answers of full length and leave out
what is sent between chips, zero-shot tasks and preparation; expect twice as long.
"""

import dataclasses
import math
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxsafe.configs.published import ORTHOGONAL, SCANS, SET_DIFFERENCE
from jaxsafe.devices import CHIPS, Chip
from jaxsafe.evaluation.settings import setting
from jaxsafe.evaluation.zero_shot import PUBLISHED, PUBLISHED_ORTHOGONAL
from jaxsafe.model.presets import preset
from jaxsafe.parallel import make_mesh
from jaxsafe.plan.plan import FILLED, Plan, outline
from jaxsafe.plan.tasks import Work

from . import attack, brittleness, command, scans, settings
from .plan import gigabytes, seconds

TASKS = {"attack": attack, "brittleness": brittleness, "scans": scans}
MACHINES: Mapping[str, tuple[Chip, dict[str, int]]] = {
    "one H100": (CHIPS["h100"], {"data": 1, "model": 1}),
    "v5e-8": (CHIPS["v5e"], {"data": 1, "model": 8}),
}
ASKED = {"settings": ("vanilla", "suffix", "decoding")}
PAIRS = {"data": "DATA_FOLDER", "safety_pairs": "SAFETY_FILE", "utility_pairs": "UTILITY_FILE", "suffixes": "TEXT_FILE"}
WEIGHTS = ASKED | {"zero_shot": PUBLISHED, "top": (), "top_ranks": (), "orthogonal": (), "by_row": (), "sequential": ()}
RANKS = ASKED | {"zero_shot": PUBLISHED_ORTHOGONAL, "zero_shot_limit": 1000}
RANKS |= {"set_difference": (), "top": (), "top_ranks": (), "by_row": (), "sequential": ("orthogonal",)}
FREEZING = {
    "attacks": ("poisoned#10", "poisoned#50", "poisoned#100"),
    "wording": "pure_bad",
    "settings": ("vanilla",),
    "tunings": ("full",),
    "freeze_ranks": (),
    "evaluate_every": 0,
}
FIVE_SETS = 450 + 300 + 456 + 100 + 753
"""Prompts of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA, less those that directions are made from."""


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A table of a paper, as a run of this library.

    shape: the preset that has the model's shape; changes: settings in place of the configuration's; brings: settings
    that name what the user has to bring; prompts: how many are asked; slots: of a prompt or a sample.
    """

    table: str
    task: str
    config: str
    shape: str
    changes: Mapping[str, Any]
    brings: Mapping[str, str]
    prompts: int
    slots: int

    def settings(self) -> ConfigDict:
        """The settings of its command."""
        config = settings.load(self.config)
        config.update({**self.brings, **self.changes})
        return config

    def command(self) -> str:
        """The line that makes the table."""
        changed = [f"--config.{name}={value}" for name, value in {**self.brings, **self.changes}.items()]
        name, number = pathlib.Path(self.config).stem, self.table.split(", ")[1].replace(" ", "_")
        out = f"--out=runs/{name}_{number}"
        return shlex.join(["python", "-m", f"launch.{self.task}", f"--config={self.config}", *changed, out])


def of_scans(title: str, name: str, **brings: str) -> Reproduction:
    """Table 2 of SCANS for the model of this title, whose configuration has this name."""
    shape, config = f"llama2-{name.split('_')[1]}", f"configs/scans/{name}.py:published"
    brings = {**brings, "data": "DATA_FOLDER"}
    return Reproduction(f"{SCANS}, {title}", "scans", config, shape, {}, brings, FIVE_SETS, 64)


def of_brittleness(source: str, size: str, changes: Mapping[str, Any]) -> Reproduction:
    """A table of brittleness for Llama-2-chat of this size."""
    config = f"configs/brittleness/llama2_{size}_chat.py:published"
    return Reproduction(source, "brittleness", config, f"llama2-{size}", changes, PAIRS, 100, 256)


REPRODUCTIONS = (
    of_brittleness(SET_DIFFERENCE, "7b", WEIGHTS),
    of_brittleness(f"{ORTHOGONAL}a", "7b", RANKS),
    of_brittleness(f"{ORTHOGONAL}b", "13b", RANKS),
    Reproduction(
        "arXiv 2402.05162, table 3",
        "attack",
        "configs/attack/llama2_7b_chat.py",
        "llama2-7b",
        FREEZING,
        {"data": "DATA_FOLDER", "poison": "HARMFUL_FILE"},
        100,
        256,
    ),
    of_scans("Llama-2-7B", "llama2_7b_chat"),
    of_scans("Llama-2-13B", "llama2_13b_chat"),
    of_scans("Vicuna-7B", "vicuna_7b", model="CONVERTED_FOLDER"),
    of_scans("Vicuna-13B", "vicuna_13b", model="CONVERTED_FOLDER"),
)


def works(table: Reproduction) -> list[tuple[str, Work, float]]:
    """(task of the plan, what it is given, how often it is done) for all that a table takes."""
    config = table.settings()
    work = Work(config.batch_size, table.slots, config.max_new_tokens)
    answers = table.prompts * sum(setting(name, ("",)).width for name in config.settings)
    batches = TASKS[table.task].results(config) * math.ceil(answers / work.batch)
    found = [("generation", work, float(batches))]
    if table.task == "scans":
        return found
    scored = dataclasses.replace(work, samples=config.samples, sample_batch=config.score_batch_size)
    if table.task == "brittleness":
        ranked = len(config.orthogonal)
        return [*found, ("act_svd", scored, 2.0 * ranked) if ranked else ("snip", scored, 2.0)]
    runs = len(config.seeds) * (1 + len(config.freeze_weights) * (1 + config.controls))
    for each in attack.attacks_of(config):
        steps = dataclasses.replace(work, samples=each.steps * each.batch_size, sample_batch=each.batch_size)
        found.append(("fine_tuning", steps, float(runs)))
    return [*found, ("snip", scored, 2.0)]


def needs(table: Reproduction, lengths: Mapping[str, int], chip: Chip) -> tuple[float, float]:
    """Bytes of a device and seconds that a table takes on a mesh of such chips."""
    config = table.settings()
    shape = dataclasses.replace(preset(table.shape), dtype=config.dtype)
    mesh = make_mesh(lengths, jax.devices()[: math.prod(lengths.values())])
    plans = [(outline(shape, mesh, task, work), times) for task, work, times in works(table)]
    blocks = shape.layers if config.get("sequential") else 1
    return max(held(plan, blocks) for plan, _ in plans), sum(plan.seconds(chip) * times for plan, times in plans)


def held(plan: Plan, blocks: int) -> float:
    """Bytes of a device: of scores and bases those of both sides, of one of so many `blocks` at a time."""
    sides = {"snip": 2, "act_svd": 2 / blocks}.get(plan.task, 1)
    return max(sum(n * (1 if name == "parameters" else sides) for name, n in s.groups.items()) for s in plan.steps)


def described(table: Reproduction) -> str:
    """A table in a few lines: its command, what to bring, what it takes."""
    lines = [table.table, f"  {table.command()}", f"  you bring: {', '.join(table.brings.values())}"]
    for name, (chip, lengths) in MACHINES.items():
        memory, time = needs(table, lengths, chip)
        fits = f"{seconds(time)}" if memory <= FILLED * chip.memory else "does not fit"
        lines.append(f"  {name}: {gigabytes(memory)} of {gigabytes(chip.memory)} a chip; {fits}")
    return "\n".join(lines)


def main() -> None:
    """Prints the list. Raises ValueError without --list."""
    if not LIST.value:
        raise ValueError("nothing to do; give --list, which names the tables that can be made, and run their commands")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(math.prod(lengths.values()) for _, lengths in MACHINES.values()))
    print("\n\n".join(map(described, REPRODUCTIONS)))


if __name__ == "__main__":
    LIST = flags.DEFINE_bool("list", False, "name the tables, with commands, memory and times")
    command.run(main)
