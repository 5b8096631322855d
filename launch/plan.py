"""Plans a job before there is a machine for it: what it takes of every device, and whether that fits.

python -m launch.plan --model=llama2-7b --mesh=data:4,model:2 --device=v5e

prints for each task the memory by what it is for, the operations, what is moved and sent, and the roofline time.
Nothing is loaded: `--model` is a preset, `--config` a config.json, its folder, or a launch configuration. With libtpu
installed, `--chip_compiler` takes temporaries from the TPU's own compiler, which needs no TPU.

python -m launch.plan --table

prints the smallest slice of every kind of chip that each task of the larger presets fits on, in Markdown.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxsafe.devices import CHIPS, Chip, chip
from jaxsafe.io.hf import read_config
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.presets import preset
from jaxsafe.parallel import make_mesh, mesh_lengths
from jaxsafe.plan.plan import Plan, in_turns, plan, smallest, training
from jaxsafe.plan.tasks import LEARNING, TASKS, Work

from . import command, settings

TABLE_MODELS = tuple(
    """
    llama2-7b llama2-13b llama3.1-8b llama3.1-70b llama3.1-405b mistral-7b-v0.3 qwen2.5-7b qwen3-8b gemma-2-9b
    gemma-3-4b olmo-3-7b
    """.split()
)
# Beyond what is asked for, so that a larger mesh can be looked for.
MOST_DEVICES = 256


def model_config(name: str, config: str) -> ModelConfig:
    """The shape of the preset `name`, or of the file or folder `config`.

    Raises ValueError unless exactly one is given, and for a launch configuration whose model is neither a preset nor
    a folder; FileNotFoundError where nothing is at `config`.
    """
    if bool(name) == bool(config):
        raise ValueError("give --model (a preset) or --config (a config.json, its folder, or a launch configuration)")
    if name:
        return preset(name)
    path = pathlib.Path(config)
    if path.suffix == ".py" or ".py:" in config:
        chosen = settings.load(config)
        found = of_model(chosen.model)
        return dataclasses.replace(found, dtype=found.dtype if chosen.dtype in (None, "auto") else chosen.dtype)
    return read_config(path, "bfloat16")


def of_model(name: str) -> ModelConfig:
    """The shape of the model that a launch configuration names: a folder, or a hub name like that of a preset."""
    if pathlib.Path(name).is_dir():
        return read_config(name)
    plain = name.lower().split("/")[-1].replace("meta-", "").replace("llama-", "llama")
    for ending in ("-hf", "-chat", "-instruct", "-it"):
        plain = plain.removesuffix(ending)
    return preset(plain.replace("-instruct-", "-"))


def described(device: Chip, lengths: dict[str, int]) -> list[Any]:
    """As many devices of the TPU `device` as the mesh has, known to its compiler without being there."""
    from jax.experimental import topologies

    n = math.prod(lengths.values())
    if device.topology == 0 or n & (n - 1):
        raise ValueError(f"--chip_compiler needs a TPU and a power of two of devices; got {n} x {device.name}")
    # The shape of a slice, as near to a cube as powers of two allow.
    sides = [2 ** ((n.bit_length() - 1 + i) // device.topology) for i in range(device.topology)]
    if sides == [1, 2, 2]:
        sides = [2, 2, 1]
    name = f"{device.name}:{'x'.join(map(str, sides))}"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is no TPU VM
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except RuntimeError as error:
        raise ValueError(f"--chip_compiler: no compiler for {name}; pip install libtpu ({error})") from None


def show(found: Plan, device: Chip, console: Console) -> None:
    """Prints a plan: a column a program."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in found.mesh.items())
    table = Table(title=f"{found.task} on {mesh}, {device.name}: per device, per run", title_justify="left")
    table.add_column("")
    for step in found.steps:
        table.add_column(step.name if step.runs == 1 else f"{step.name} (x {step.runs})", justify="right")
    for group in dict.fromkeys(name for step in found.steps for name in step.groups):
        table.add_row(group, *(gigabytes(step.groups.get(group, 0)) for step in found.steps))
    table.add_row("temporaries", *(gigabytes(step.temporaries) for step in found.steps))
    table.add_row(f"memory (of {gigabytes(device.memory)})", *(gigabytes(step.memory) for step in found.steps))
    table.add_section()
    for kind in sorted({c.kind for step in found.steps for c in step.collectives}):
        by_step = [next((c for c in step.collectives if c.kind == kind), None) for step in found.steps]
        table.add_row(kind, *("-" if c is None else f"{c.count} x, {gigabytes(c.bytes)}" for c in by_step))
    table.add_row("operations", *(f"{step.flops / 1e12:.3g} TFLOP" for step in found.steps))
    table.add_row("read and written", *(gigabytes(step.moved) for step in found.steps))
    times = [step.times(device) for step in found.steps]
    for what in ("compute", "memory", "network"):
        table.add_row(f"roofline, {what}", *(seconds(t[what]) for t in times))
    console.print(table)


def verdict(found: Plan, device: Chip, config: ModelConfig, work: Work, devices: Sequence[Any]) -> str:
    """One line: whether the task fits, how long it takes at the least, and where it does not, what would."""
    needs = f"needs {gigabytes(found.memory)} of {gigabytes(device.memory)}"
    if found.fits(device):
        how = f" with --config.remat={found.work.remat} --config.accumulation={found.work.parts}"
        way = how if found.task in LEARNING else ""
        return f"{found.task} fits{way}: {needs}; roofline time {seconds(found.seconds(device))} in all"
    mesh = make_mesh(found.mesh, devices[: found.devices])
    if (turns := in_turns(config, device, found.task, work, mesh)) is not None:
        some = f"with --config.layers_at_a_time={turns.work.layers} it does, in {turns.passes} passes"
        return (
            f"{found.task} does not fit: {needs}; {some}: {gigabytes(turns.memory)}, {seconds(turns.seconds(device))}"
        )
    other = smallest(config, device, found.task, work, devices)
    if other is None:
        return f"{found.task} does not fit: {needs}; nor does any mesh of {len(devices)} {device.name}"
    lengths = ",".join(f"{axis}:{n}" for axis, n in other.mesh.items())
    some = "" if other.work.sample_batch == work.sample_batch else f" --sample_batch={other.work.sample_batch}"
    some += "" if other.work.layers is None else f" with --config.layers_at_a_time={other.work.layers}"
    return f"{found.task} does not fit: {needs}; --mesh={lengths}{some} does, with {gigabytes(other.memory)}"


def gigabytes(n: float) -> str:
    """`n` bytes in GB."""
    if n == math.inf:
        return "more than all"
    return f"{n / 1e9:.3g} GB" if n >= 1e8 else f"{n / 1e6:.3g} MB"


def seconds(s: float) -> str:
    """`s` seconds in a unit that suits them."""
    if s >= 100:
        return f"{s / 60:.3g} min"
    return f"{s:.3g} s" if s >= 1 else f"{1e3 * s:.3g} ms"


def as_json(found: Plan, device: Chip) -> str:
    """A plan as one line of JSON, with its times on `device`; null for what is more than all of its memory."""

    def known(size: float) -> float | None:
        return None if size == math.inf else size

    content = dataclasses.asdict(found)
    for step, entry in zip(found.steps, content["steps"], strict=True):
        sizes = {"temporaries": known(step.temporaries), "memory": known(step.memory)}
        entry |= sizes | {"seconds": step.times(device)}
    summary = {"device": device.name, "memory": known(found.memory), "fits": found.fits(device)}
    return json.dumps(content | summary | {"seconds": found.seconds(device)})


def where(found: Plan) -> str:
    """The mesh of a plan (data x model), and in how many passes where layers go in turns."""
    return f"{found.mesh['data']}x{found.mesh['model']}" + (f" in {found.passes} passes" if found.passes > 1 else "")


def markdown_table(names: Sequence[str], tasks: Sequence[str], work: Work, devices: Sequence[Any]) -> str:
    """For every model and task the smallest slice of each chip, with its mesh (data x model) and the roofline time."""
    lines = [
        "| model | task | " + " | ".join(CHIPS) + " |",
        "|---|---|" + "---|" * len(CHIPS),
    ]
    for name in names:
        known: dict[Any, Plan] = {}
        for task in tasks:
            found = [smallest(preset(name), each, task, work, devices, known) for each in CHIPS.values()]
            cells = [
                "-" if p is None else f"{where(p)}: {seconds(p.seconds(each))}"
                for p, each in zip(found, CHIPS.values(), strict=True)
            ]
            lines.append(f"| {name} | {task} | " + " | ".join(cells) + " |")
            command.console.print(lines[-1], soft_wrap=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the flags, simulates the devices, and prints the plans."""
    work = Work(BATCH.value, LENGTH.value, NEW_TOKENS.value, SAMPLES.value, SAMPLE_BATCH.value)
    jax.config.update("jax_platforms", "cpu")
    if TABLE.value:
        jax.config.update("jax_num_cpu_devices", MOST_DEVICES)
        names = MODEL.value.split(",") if MODEL.value else TABLE_MODELS
        print(markdown_table(names, TASK.value or list(TASKS), work, jax.devices()), end="")
        return
    config, device, asked = model_config(MODEL.value, CONFIG.value), chip(DEVICE.value), flags.FLAGS["mesh"].value or ""
    lengths = mesh_lengths(asked)
    n = math.prod(lengths.values())
    if n < 1:
        raise ValueError(f"--mesh={asked}: give every length; there are no devices here to divide")
    jax.config.update("jax_num_cpu_devices", max(n, MOST_DEVICES))
    own = described(device, lengths) if CHIP_COMPILER.value else None
    if own:  # programs for devices that are not there cannot be read back from the cache
        jax.config.update("jax_enable_compilation_cache", False)
    mesh = make_mesh(lengths, jax.devices()[:n])
    for task in TASK.value or list(TASKS):
        if task in LEARNING:
            found = training(config, mesh, task, work, device, own)
        else:
            found = plan(config, mesh, task, work, own)
        if JSON.value:
            print(as_json(found, device), flush=True)
        else:
            show(found, device, Console())
            print(verdict(found, device, config, work, jax.devices()) + "\n", flush=True)


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "", "a preset, such as llama2-7b; with --table one or several")
    CONFIG = flags.DEFINE_string("config", "", "instead: a config.json, its folder, or a launch configuration")
    DEVICE = flags.DEFINE_string("device", "v5e", f"one of {', '.join(CHIPS)}")
    TASK = flags.DEFINE_list("task", [], f"of {', '.join(TASKS)}; all by default")
    BATCH = flags.DEFINE_integer("batch", 32, "prompts answered at a time, on all devices together", lower_bound=1)
    LENGTH = flags.DEFINE_integer("length", 256, "slots of a prompt or a sample; half of a sample's are its answer", 2)
    NEW_TOKENS = flags.DEFINE_integer("new_tokens", 256, "tokens generated after each prompt", lower_bound=2)
    SAMPLES = flags.DEFINE_integer("samples", 128, "samples scored, or learned from once", lower_bound=1)
    SAMPLE_BATCH = flags.DEFINE_integer("sample_batch", 8, "samples at a time, on all devices together", lower_bound=1)
    JSON = flags.DEFINE_bool("json", False, "one line of JSON a task")
    TABLE = flags.DEFINE_bool("table", False, "the smallest slices for the larger presets, in Markdown")
    CHIP_COMPILER = flags.DEFINE_bool("chip_compiler", False, "temporaries by the TPU's own compiler (needs libtpu)")
    command.run(main)
