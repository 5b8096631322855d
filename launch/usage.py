"""What --help and --version print."""

import importlib.metadata
import sys
import textwrap
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

import jaxsafe
from jaxsafe.configs.fields import Fields

from .settings import Experiment, file_of, load

HELP = {"--help", "-help", "-h", "--h", "-?", "--helpshort", "--helpfull"}
WIDTH = 100


def asked(argv: Sequence[str], experiment: Experiment | None) -> str | None:
    """The text that `argv` asks for in place of a run, None where it asks for a run. Raises ValueError as `load`."""
    if "--version" in argv:
        return f"jaxsafe {jaxsafe.__version__} (jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')})"
    if HELP.isdisjoint(argv):
        return None
    about = (sys.modules["__main__"].__doc__ or "").strip()
    parts = [about, "Flags:\n" + _flags(experiment)]
    if experiment is not None:
        file, _ = file_of(argv, experiment.config)
        title = f"Settings (--config.NAME=VALUE), with their defaults and what {file} has in their place:\n"
        parts.append(title + _settings(experiment.fields, load(file, experiment.fields)))
    return "\n\n".join(parts)


def _flags(experiment: Experiment | None) -> str:
    """The flags of the launch scripts; those of libraries are not for users."""
    own = {
        flag.name: flag
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        for flag in defined
        if not module.startswith("absl")
    }
    lines = [_entry(f"--{name}", flag.default, flag.help or "") for name, flag in sorted(own.items())]
    if experiment is not None:
        lines.insert(0, _entry("--config", experiment.config, "the experiment: a file, or file.py:variant"))
    return "\n".join([*lines, _entry("--version", None, "print the version"), _entry("--help", None, "print this")])


def _settings(fields: Fields, config: ConfigDict) -> str:
    lines = []
    for name, field in fields.items():
        here = config.get(name, field.default)
        names = f" ({', '.join(field.choices)})" if field.choices else ""
        changed = "" if here == field.default else f" [here: {here!r}]"
        lines.append(_entry(name, field.default, field.meaning + names + changed, none="None"))
    return "\n".join(lines)


def _entry(name: str, default: object, meaning: str, none: str = "") -> str:
    value = none if default is None else repr(default)
    text = textwrap.fill(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return f"  {name}" + (f" = {value}" if value else "") + f"\n{text}"
