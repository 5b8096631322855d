"""The settings of an experiment, from a config file and the command line; what cannot be is found before any work."""

import ast
import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxsafe.configs.fields import Fields, check, check_value, nearest

OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A task as its launch script knows it.

    config: the file that is taken where none is named; check: raises ValueError for settings that contradict each
    other, and for prompts that are not there.
    """

    config: str
    fields: Fields
    check: Callable[[ConfigDict], object]


def located(path: str) -> pathlib.Path:
    """Where `path` is: in the current folder or, for one that begins with configs/, beside the launch scripts.

    Raises FileNotFoundError.
    """
    shipped = pathlib.Path(__file__).parent.parent / path
    if pathlib.Path(path).is_file():
        return pathlib.Path(path)
    if pathlib.Path(path).parts[:1] == ("configs",) and shipped.is_file():
        return shipped
    raise FileNotFoundError(f"--config={path}: no such file; give a config file, such as configs/scans/smollm2_135m.py")


def load(text: str, fields: Fields | None = None) -> ConfigDict:
    """The config of "file.py", or of "file.py:variant", whose settings are `fields`.

    Raises FileNotFoundError, and ValueError in one line for whatever is wrong with the file.
    """
    path, *variant = text.split(":", 1)
    spec = importlib.util.spec_from_file_location("config_file", located(path))
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={path}: no Python file; give one with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*variant) if hasattr(module, "get_config") else None
    except SyntaxError as error:
        raise ValueError(f"--config={path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:  # the file is the user's: whatever it raises has one way out
        if unknown := re.search(r'Key "(\w+)" does not exist', str(error)):
            line = f"config.{unknown[1]} is no setting; {nearest(unknown[1], fields or ())}"
        else:
            line = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"--config={path}: {line}") from None
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config={path}: needs a function get_config() that returns a ConfigDict")
    return config


def file_of(argv: Sequence[str], usual: str) -> tuple[str, list[str]]:
    """The file that --config names in `argv`, else the `usual` one, and `argv` without it."""
    named, rest, words = usual, [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-config"):
            named = value if equals else next(words, "")
        else:
            rest.append(word)
    return named, rest


def parse(argv: Sequence[str], experiment: Experiment) -> list[str]:
    """Reads all flags and defines that of the config; what is left of `argv`.

    Raises ValueError for an unknown setting, for a value that is none, and for settings that contradict each other;
    flags.Error for other flags.
    """
    named, words = file_of(flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False), experiment.config)
    config = load(named, experiment.fields)
    check(experiment.fields, config)
    for word in words:
        override = OVERRIDE.match(word)
        if override and override[1] not in experiment.fields:
            raise ValueError(f"--config.{override[1]} is no setting; {nearest(override[1], experiment.fields)}")
    config_flags.DEFINE_config_dict("config", config, "the experiment", sys_argv=words)
    try:
        rest = flags.FLAGS(words)
    except flags.IllegalFlagValueError as error:
        _check_word(experiment.fields, str(error))
        raise
    config.mesh = flags.FLAGS["mesh"].value or config.mesh
    check(experiment.fields, config)
    experiment.check(config)
    return rest


def _check_word(fields: Fields, refused: str) -> None:
    """Raises ValueError that says what would be right where the flag that was `refused` is a setting."""
    if wrong := re.match(r"flag --config\.(\w+)=(.*?): ", refused, re.DOTALL):
        try:
            value = ast.literal_eval(wrong[2])
        except (SyntaxError, ValueError):
            value = wrong[2]
        check_value(wrong[1], fields[wrong[1]], value)
