"""What every launch script shares: one clear line for bad input, and the compilation cache."""

import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from rich.console import Console

from jaxsafe.io.hub import cache_dir

BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
console = Console(stderr=True, highlight=False)


def complain(error: BaseException) -> int:
    """Prints the error on one line and returns the exit status of bad input."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    return 2


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        sys.exit(complain(error))
    except (AttributeError, KeyError, OSError, TypeError, ValueError, SyntaxError, ImportError) as error:
        sys.exit(complain(ValueError(f"--config: {error}")))
    if len(rest) > 1:
        sys.exit(complain(ValueError(f"unknown argument {rest[1]!r}; every argument is a --flag (see --help)")))
    return rest


def run(main: Callable[[], None]) -> None:
    """Runs `main` under absl flags. Bad input ends with one line and status 2, an interrupt with status 130."""

    def guarded(argv: Sequence[str]) -> None:
        del argv
        logging.set_verbosity(logging.ERROR)
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        try:
            main()
        except BAD_INPUT as error:
            if flags.FLAGS["debug"].value:
                raise
            sys.exit(complain(error))
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from what is finished", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)


flags.DEFINE_bool("debug", False, "show where an error comes from instead of one line")
