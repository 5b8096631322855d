"""Whose fault an error is: that of what a run was given, which one line explains, or that of the program."""

import dis
import platform

import jax
from jinja2 import TemplateError
from msgspec import DecodeError
from safetensors import SafetensorError

import jaxsafe

READING = (OSError, UnicodeError, SafetensorError, TemplateError, DecodeError)
"""What goes wrong with files, the network and what they hold, whoever reads them."""
COMPUTING = frozenset("jax jaxlib flax optax numpy scipy sklearn".split())
"""Libraries that are given what this package made: a ValueError of theirs is a fault of the program."""
OWN = frozenset("jaxsafe launch configs __main__".split())
MEMORY = (
    "out of memory: lower config.batch_size (scores: config.score_batch_size, training: config.tuning_batch_size, or "
    "raise config.accumulation), or use more devices (--mesh); the task `plan` says what fits"
)


def of_input(error: BaseException) -> str | None:
    """One line on an error that the input or the machine is to blame for; None for a fault of the program.

    A ValueError is of the input where a `raise` of this package says so, or a library that reads files.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text
    ):
        return MEMORY
    if isinstance(error, READING) or text.startswith("Unable to initialize backend"):
        return text
    return text if isinstance(error, ValueError) and _meant(error) else None


def _meant(error: BaseException) -> bool:
    """Whether a `raise` of this package, or a library that reads, made the error."""
    deepest = error.__traceback__
    while deepest is not None and deepest.tb_next is not None:
        deepest = deepest.tb_next
    if deepest is None:
        return True
    library = str(deepest.tb_frame.f_globals.get("__name__")).partition(".")[0]
    operation = dis.opname[deepest.tb_frame.f_code.co_code[deepest.tb_lasti]]
    return operation == "RAISE_VARARGS" if library in OWN else library not in COMPUTING


def of_program() -> str:
    """What follows the traceback of a fault of the program."""
    versions = f"jaxsafe {jaxsafe.__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    return f"this is a fault of the program; please report it with the command and the traceback above ({versions})"
