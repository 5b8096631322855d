"""Which tables of the two papers can be made here: what each takes, before anything runs.

python -m launch.reproduce --list

names every table with its command, what you bring to it, and for one H100 and a v5e slice of eight chips the memory
and the roofline time. Nothing is loaded or compiled. Memory is that of weights, caches, scores, bases and training
state: temporaries, and a tree of edited weights, come on top. Times count answers of full length, one suffix, and
leave out what is sent between chips, zero-shot tasks and the directions of SCANS; half of a roofline's speed is good.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxsafe.configs.reproductions import BROUGHT, REPRODUCTIONS, Reproduction
from jaxsafe.devices import CHIPS, Chip
from jaxsafe.evaluation.settings import setting
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


def settings_of(table: Reproduction) -> ConfigDict:
    """The settings of a table's command."""
    config = settings.load(table.config)
    config.update({**table.brings, **table.changes})
    return config


def works(table: Reproduction) -> list[tuple[str, Work, float]]:
    """(task of the plan, what it is given, how often it is done) for all that a table takes."""
    config = settings_of(table)
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
    config = settings_of(table)
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
    brought = "; ".join(f"{word} ({BROUGHT[word]})" for word in table.brings.values())
    lines = [table.table, f"  {table.command}", f"  you bring: {brought}"]
    for name, (chip, lengths) in MACHINES.items():
        memory, time = needs(table, lengths, chip)
        fits = f"roofline time {seconds(time)}" if memory <= FILLED * chip.memory else "does not fit"
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
