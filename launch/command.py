"""What every launch script shares: its processes and devices, one clear line for bad input, the compilation cache."""

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from jaxsafe.io.hub import Named, cache_dir, model_config
from jaxsafe.parallel import default_mesh, device_memory, parse_mesh, undivided

from . import settings, usage
from .accelerator import suit_cpu
from .faults import of_input, of_program
from .interruption import Interrupted, interruptible

console = Console(stderr=True, highlight=False)


def complain(error: BaseException | str) -> int:
    """Prints the error on one line and returns the exit status of bad input."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    return 2


def say(line: str) -> None:
    """Prints a line to standard error, whatever its length; of several processes, the first one does."""
    console.print(line, markup=False, soft_wrap=True)


def _parse(argv: Sequence[str], experiment: settings.Experiment | None) -> list[str]:
    """What is left of `argv` when all flags are read. Ends the process for --help, --version and what is wrong."""
    try:
        if (text := usage.asked(argv, experiment)) is not None:
            print(text)
            sys.exit(0)
        rest = flags.FLAGS(list(argv)) if experiment is None else settings.parse(argv, experiment)
    except flags.Error as error:
        sys.exit(complain(error))
    except Exception as error:
        sys.exit(explain(error, "--debug" in argv))
    if len(rest) > 1:
        sys.exit(complain(ValueError(f"unknown argument {rest[1]!r}; every argument is a --flag (see --help)")))
    return rest


def config() -> ConfigDict:
    """The settings of the experiment that was started."""
    return flags.FLAGS["config"].value


def run(main: Callable[[], None], experiment: settings.Experiment | None = None) -> None:
    """Runs `main` under absl flags, and under the settings of an `experiment` where it is one.

    Bad input ends with one line and status 2, SIGINT and SIGTERM with one line and 130 and 143, a fault of the program
    with its traceback and status 1.
    """

    def guarded(argv: Sequence[str]) -> None:
        del argv
        logging.set_verbosity(logging.ERROR)
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        jax.config.update("jax_traceback_filtering", "off")  # whose fault an error is shows in its whole traceback
        suit_cpu()
        given = flags.FLAGS.flag_values_dict()
        try:
            join(given["distributed"], given["coordinator"], given["num_processes"], given["process_id"])
            with interruptible(_signals(), say), profiled(given["profile"]):
                main()
        except KeyboardInterrupt as end:
            sys.exit(end.status if isinstance(end, Interrupted) else 130)
        except Exception as error:
            sys.exit(explain(error, given["debug"]))

    app.run(guarded, flags_parser=lambda argv: _parse(argv, experiment))


def explain(error: Exception, debug: bool = False) -> int:
    """Prints an error, with its traceback where the program is to blame or `debug`; returns the exit status."""
    line = of_input(error)
    if line is None or debug:
        traceback.print_exception(error)
    if line is not None:
        return complain(line)
    print(of_program(), file=sys.stderr)
    return 1


def _signals() -> list[int]:
    """The signals that end this process; of several processes, JAX hears SIGTERM and makes them agree on a step."""
    return [signal.SIGINT] if jax.distributed.is_initialized() else [signal.SIGINT, signal.SIGTERM]


def join(distributed: bool, coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several: found by JAX (TPU VMs, SLURM, GKE), or at the `coordinator` "host:port".

    Only process 0 tells of its progress. Raises ValueError where the three flags of a coordinator do not all stand,
    and where nothing tells JAX of the others.
    """
    by_hand = coordinator or None, num_processes, process_id
    if any(value is not None for value in by_hand):
        if None in by_hand:
            raise ValueError("--coordinator=HOST:PORT, --num_processes and --process_id go together; give all three")
        jax.distributed.initialize(*by_hand)
    elif distributed:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(f"--distributed: no cluster was found ({error}); use --coordinator") from None
    console.quiet = jax.process_index() > 0 if jax.distributed.is_initialized() else False


@contextlib.contextmanager
def profiled(folder: str) -> Iterator[None]:
    """Writes a trace of what is done inside to `folder` (for TensorBoard or Perfetto), where one is given."""
    if not folder:
        yield
        return
    with jax.profiler.trace(folder):
        yield


def mesh_of(text: str, name: Named, dtype: str | None) -> Mesh | None:
    """The mesh of the line `text`; where it is empty, one that suits the model `name` and the devices found.

    None for a single device. Says once which axes of weights the mesh does not divide.
    """
    devices = jax.devices()
    if not text and len(devices) == 1:
        return None
    config = model_config(name, dtype)
    mesh = parse_mesh(text) if text else default_mesh(config, devices, device_memory(devices[0]))
    if mesh is not None:
        console.print("mesh " + ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items()))
        for axis in undivided(config, mesh):
            console.print(f"every device holds whole what is not divided: {axis}")
    return mesh


flags.DEFINE_bool("debug", False, "show where an error comes from instead of one line")
flags.DEFINE_string("mesh", "", "devices by axis, as data:-1,model:4, for config.mesh; empty: what suits the model")
flags.DEFINE_string("profile", "", "folder for a trace of the run")
flags.DEFINE_bool("distributed", False, "one of several processes, which JAX finds (TPU VMs, SLURM, GKE)")
flags.DEFINE_string("coordinator", "", "host:port of process 0, where JAX does not find the others by itself")
flags.DEFINE_integer("num_processes", None, "how many processes there are, with --coordinator", lower_bound=1)
flags.DEFINE_integer("process_id", None, "the number of this one, with --coordinator", lower_bound=0)
