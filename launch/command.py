"""What every launch script shares: its processes and devices, one clear line for bad input, the compilation cache."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from jaxsafe.io.hub import cache_dir, model_config
from jaxsafe.parallel import default_mesh, device_memory, parse_mesh, undivided

from . import settings, usage

BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
console = Console(stderr=True, highlight=False)


def complain(error: BaseException) -> int:
    """Prints the error on one line and returns the exit status of bad input."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    return 2


def _parse(argv: Sequence[str], experiment: settings.Experiment | None) -> list[str]:
    """What is left of `argv` when all flags are read. Ends the process for --help, --version and what is wrong."""
    try:
        if (text := usage.asked(argv, experiment)) is not None:
            print(text)
            sys.exit(0)
        rest = flags.FLAGS(list(argv)) if experiment is None else settings.parse(argv, experiment)
    except (flags.Error, *BAD_INPUT) as error:
        if "--debug" in argv:
            raise
        sys.exit(complain(error))
    if len(rest) > 1:
        sys.exit(complain(ValueError(f"unknown argument {rest[1]!r}; every argument is a --flag (see --help)")))
    return rest


def config() -> ConfigDict:
    """The settings of the experiment that was started."""
    return flags.FLAGS["config"].value


def run(main: Callable[[], None], experiment: settings.Experiment | None = None) -> None:
    """Runs `main` under absl flags, and under the settings of an `experiment` where it is one.

    Bad input ends with one line and status 2, an interrupt with status 130.
    """

    def guarded(argv: Sequence[str]) -> None:
        del argv
        logging.set_verbosity(logging.ERROR)
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        given = flags.FLAGS.flag_values_dict()
        try:
            join(given["distributed"], given["coordinator"], given["num_processes"], given["process_id"])
            with profiled(given["profile"]):
                main()
        except BAD_INPUT as error:
            if given["debug"]:
                raise
            sys.exit(complain(error))
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from what is finished", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=lambda argv: _parse(argv, experiment))


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


def mesh_of(text: str, name: str, dtype: str | None) -> Mesh | None:
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
