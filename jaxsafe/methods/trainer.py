"""Fine-tuning that can be killed and taken up again: all weights or low-rank adapters, any part of them frozen.

The weights after a run follow from the given weights, rows and settings alone, however often it was interrupted.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsafe.digest import digest
from jaxsafe.io.checkpoint import checksum, note, open_checkpoints, outline, restore, save, stoppable
from jaxsafe.kernels import lora
from jaxsafe.kernels.forward import joined_tokens
from jaxsafe.kernels.lora import LoRA
from jaxsafe.kernels.training import Recipe, batch_plan, masters, model_weights, one_step
from jaxsafe.methods.course import Saving, State, course
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.parallel import put_rows
from jaxsafe.rows import Row, data_sha256, pad_rows

SCHEDULES = ("constant", "linear", "cosine", "stepped")
FREE = optax.identity()
"""Nothing is frozen."""


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A run of `steps` batches of `batch_size` rows, each taken in `accumulation` parts, by AdamW.

    The learning rate rises over `warmup` steps to `learning_rate` and stays ("constant") or falls to
    `final_share` of it at the last step ("linear", "cosine"), or is taken times `decay` after every `decay_every` steps
    ("stepped"). `lora` None trains the weights themselves. `remat`
    computes layers again in the backward pass instead of keeping their activations. `slots` (all, of the answer) is
    the shape of every batch, formed without regard to length; None puts rows of like length together. A checkpoint
    is written every `checkpoint_every` steps, and with `checkpoint_end` at the end.
    """

    steps: int = 100
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-5
    schedule: str = "constant"
    warmup: int = 0
    final_share: float = 0.0
    decay: float = 1.0
    decay_every: int = 1
    weight_decay: float = 0.0
    lora: LoRA | None = None
    remat: bool = False
    slots: tuple[int, int] | None = None
    seed: int = 0
    checkpoint_every: int = 100
    checkpoint_end: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "decay_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} does not divide into accumulation {self.accumulation}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is not known; use one of {', '.join(SCHEDULES)}")
        if self.decay <= 0:
            raise ValueError(f"decay {self.decay} is not positive")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup {self.warmup} must be at least 0 and below the {self.steps} steps of the run")


def learning_rates(settings: FineTuning) -> optax.Schedule:
    """The learning rate by step; it is proportional to `settings.learning_rate`."""
    peak, rest = settings.learning_rate, settings.steps - settings.warmup
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, settings.final_share * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, settings.final_share),
        "stepped": optax.exponential_decay(peak, settings.decay_every, settings.decay, staircase=True),
    }[settings.schedule]
    if not settings.warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, settings.warmup), after], [settings.warmup])


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a run is after `number` steps.

    loss: of the last step, before it (nats a token of the answers), None where there is none yet; weights: gives the
    model's weights, in `config.dtype`, and adapters what is trained where that is adapters (see `lora.init`); both are
    of use before the next step is taken; begins: whether the run begins here, or goes on from here.
    """

    number: int
    loss: float | None
    weights: Callable[[], Params]
    begins: bool = False
    adapters: Mapping[str, Any] | None = None


def train(
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    settings: FineTuning,
    frozen: optax.GradientTransformation = FREE,
    mesh: Mesh | None = None,
    folder: str | os.PathLike | None = None,
) -> Generator[Step, None, None]:
    """Fine-tuning on the answers of `rows`: where the run begins, then every step as it is asked for.

    `frozen` is what may not move (see `kernels/freezing.py`); of adapters it freezes the change that they make to
    the weights. `params` lie on `mesh` and are left as they are; adapters are merged into the weights of a step.
    Runs that differ in rows, seed, learning rate or what is frozen share one compiled step where their shapes are
    alike.

    Checkpoints go to `folder` (none without one), and a run that finds some there goes on from the latest, which is
    the first step that it yields. Such a run writes a checkpoint where it is closed before its end, and on Ctrl-C and
    SIGTERM, which wait for the step in hand and then raise KeyboardInterrupt and SystemExit(143), unless others listen
    to them; on SIGTERM several processes end at a step on which they agree. Raises ValueError for rows without answers,
    rows beyond the model's context, a batch that the mesh does not divide, and a folder of another run.
    """
    check_rows(config, rows, settings, mesh)
    return _steps(config, params, rows, settings, frozen, mesh, folder)


def trained(steps: Iterable[Step]) -> dict[str, Any]:
    """The weights after all of `steps`. Raises ValueError where there are none."""
    last = collections.deque(steps, maxlen=1)
    if not last:
        raise ValueError("a run without any step has no weights")
    return dict(last[0].weights())


def _steps(
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    settings: FineTuning,
    frozen: optax.GradientTransformation,
    mesh: Mesh | None,
    folder: str | os.PathLike | None,
) -> Generator[Step, None, None]:
    lengths = [len(row.ids) if settings.slots is None else 1 for row in rows]
    plan = batch_plan(lengths, settings.batch_size, settings.steps, settings.seed)
    width, shared = None if settings.slots is None else settings.slots[0], joined(rows, settings, mesh)
    tree, fixed, recipe = begin(config, params, rows, settings, frozen, mesh)
    step = compiled_step(recipe, tree)
    weights = weights_program(config, params, settings, frozen)

    def take(i: int, tree: Any) -> tuple[Any, float]:
        batch = put_rows(pad_rows([rows[j] for j in plan[i]], width, settings.batch_size, shared=shared), mesh)
        tree, nats = step(tree, batch, fixed)
        return tree, float(nats)

    def step_of(state: State, begins: bool = False) -> Step:
        trained = state.tree["params"]
        adapters = None if settings.lora is None else trained
        return Step(state.done, state.loss, functools.partial(weights, trained, fixed), begins, adapters)

    with contextlib.ExitStack() as stack:
        begun, saving = State(0, tree, None), None
        if folder is not None:
            whole = stack.enter_context(stoppable())
            checkpoints = stack.enter_context(open_checkpoints(folder))
            run = identity(params, rows, settings, frozen)
            if checkpoints.latest is not None:
                like = outline(tree)
                del begun, tree  # the memory is needed for what is read
                resumed: Any = restore(checkpoints, like, run)
                begun = State(resumed[0], resumed[1], note(checkpoints))

            def keep(state: State) -> None:
                save(checkpoints, state.done, state.tree, run, state.loss)

            saving = Saving(keep, settings.checkpoint_every, whole, settings.checkpoint_end)
        yield step_of(begun, begins=True)
        for state in stack.enter_context(contextlib.closing(course(begun, settings.steps, take, saving))):
            yield step_of(state)


def check_rows(config: ModelConfig, rows: Sequence[Row], settings: FineTuning, mesh: Mesh | None) -> None:
    """Raises ValueError for rows that cannot be trained on, or whose batches do not divide over `mesh`."""
    if not any(len(row.ids) - 1 > row.instruction_end for row in rows):
        raise ValueError(f"none of the {len(rows)} rows has an answer to train on")
    for i, row in enumerate(rows):
        if len(row.ids) > config.context:
            raise ValueError(f"row {i} has {len(row.ids)} tokens; the model's context is {config.context} tokens")
        size = len(row.ids), len(row.ids) - 1 - row.instruction_end
        if settings.slots is not None and (size[0] > settings.slots[0] or size[1] > settings.slots[1]):
            raise ValueError(f"row {i} has {size[0]} tokens, {size[1]} of its answer; slots are {settings.slots}")
    part, devices = settings.batch_size // settings.accumulation, 1 if mesh is None else mesh.shape["data"]
    if part % devices:
        raise ValueError(f"parts of {part} rows do not divide over {devices} devices of the data axis")


def joined(rows: Sequence[Row], settings: FineTuning, mesh: Mesh | None) -> int:
    """How many first tokens a step runs once for a batch: none where rows drop inputs of their own."""
    dropping = settings.lora is not None and settings.lora.dropout > 0
    return 0 if dropping else joined_tokens(rows, mesh)


def begin(
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    settings: FineTuning,
    frozen: optax.GradientTransformation,
    mesh: Mesh | None,
) -> tuple[Any, Any, Recipe]:
    """What changes from step to step ("params" and "optimizer"), what does not, and how a step is made."""
    own = rules(settings, frozen).optimizer
    shared, key = shared_rules(settings, frozen), {}
    fixed = {"rate": _on_mesh(jnp.float32(settings.learning_rate), mesh)}
    if settings.lora is None:
        trained = masters(params)
    else:
        trained = lora.init(config, settings.lora, settings.seed, mesh)
        scale = _on_mesh(jnp.float32(settings.lora.scale), mesh)
        fixed |= {"params": dict(params), "frozen": _on_mesh(frozen.init(params), mesh), "scale": scale}
        key = {"key": jax.random.key_data(jax.random.key(settings.seed))} if settings.lora.dropout else {}
    longest = max(len(row.ids) - 1 - row.instruction_end for row in rows)
    last = longest if settings.slots is None else settings.slots[1]
    recipe = Recipe(config, shared.optimizer, last, shared.running, settings.accumulation, settings.remat)
    return _on_mesh({"params": trained, "optimizer": own.init(trained), **key}, mesh), fixed, recipe


class Rules(NamedTuple):
    """How a run moves what is trained, and what makes the model's weights of that and of what is fixed.

    running: (config, trained, fixed, keys of the rows) -> the weights that a step runs; merged: (config, trained,
    fixed) -> those that are left.
    """

    optimizer: optax.GradientTransformation
    running: Callable[[ModelConfig, Any, Any, Any], Params]
    merged: Callable[[ModelConfig, Any, Any], Params]


def rules(settings: FineTuning, frozen: optax.GradientTransformation) -> Rules:
    """The rules of a run: AdamW, then what is frozen."""
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(settings.weight_decay),
        scale_by_rate(learning_rates(dataclasses.replace(settings, learning_rate=1.0))),
    )
    if settings.lora is None:
        return Rules(optax.chain(optimizer, frozen), model_weights, model_weights)
    running = functools.partial(_running, frozen, settings.lora.dropout)
    return Rules(optimizer, running, functools.partial(adapted, frozen))


def scale_by_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Updates times `rate`, which each call is given, so that another one compiles nothing, and the share by step."""
    scheduled = optax.scale_by_learning_rate(schedule)

    def update(updates: Any, state: Any, params: Any = None, *, rate: Any, **_: Any) -> tuple[Any, Any]:
        shares, state = scheduled.update(updates, state, params)
        return jax.tree.map(lambda share: rate * share, shares), state

    return optax.GradientTransformationExtraArgs(scheduled.init, update)


def shared_rules(settings: FineTuning, frozen: optax.GradientTransformation) -> Rules:
    """`rules`, the same objects for runs of one compiled step; only their updates are of use."""
    adapters = settings.lora and dataclasses.replace(settings.lora, rank=1, alpha=1.0)
    same = dataclasses.replace(
        settings, seed=0, checkpoint_every=1, checkpoint_end=True, learning_rate=1.0, lora=adapters
    )
    return _cached_rules(same, frozen.update)


@functools.lru_cache(maxsize=16)
def _cached_rules(settings: FineTuning, update: Any) -> Rules:
    return rules(settings, optax.GradientTransformation(lambda params: None, update))


def _running(
    frozen: optax.GradientTransformation, dropout: float, config: ModelConfig, adapters: Any, fixed: Any, keys: Any
) -> dict[str, Any]:
    """What a step of adapters runs: the weights with them beside, or merged where something is frozen."""
    if frozen.update is FREE.update:
        return lora.unmerged(fixed["params"], adapters, fixed["scale"], keys, dropout)
    if keys is None:
        return adapted(frozen, config, adapters, fixed)
    return lora.beside_changes(config, fixed["params"], _change(frozen, adapters, fixed), keys, dropout)


def adapted(frozen: optax.GradientTransformation, config: ModelConfig, adapters: Any, fixed: Any) -> dict[str, Any]:
    """The weights with the change that `adapters` make merged in, as far as `frozen` lets it through."""
    return lora.changed(fixed["params"], _change(frozen, adapters, fixed))


def _change(frozen: optax.GradientTransformation, adapters: Any, fixed: Any) -> Any:
    change, _ = frozen.update(lora.scaled(adapters, fixed["scale"]), fixed["frozen"], fixed["params"])
    return change


Compiled = Callable[[Any, Any, Any], tuple[Any, jax.Array]]


def compiled_step(recipe: Recipe, tree: Any) -> Compiled:
    """`step(tree, batch, fixed)`: the next tree, laid out as `tree`, and the loss; the tree given to it is consumed."""
    return _step_program(recipe, *_hashable(jax.tree.map(lambda a: a.sharding, tree)))


def weights_program(
    config: ModelConfig, params: Params, settings: FineTuning, frozen: optax.GradientTransformation
) -> Callable[[Any, Any], Params]:
    """`weights(trained, fixed)`: the model's weights, in its dtype, that lie as `params`."""
    where = jax.tree.map(lambda p: p.sharding, dict(params))
    return _weights_program(config, shared_rules(settings, frozen).merged, *_hashable(where))


@functools.lru_cache(maxsize=16)
def _step_program(recipe: Recipe, shardings: tuple[Any, ...], structure: Any) -> Compiled:
    step = functools.partial(one_step, recipe)
    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.unflatten(structure, shardings), None))


@functools.lru_cache(maxsize=16)
def _weights_program(
    config: ModelConfig,
    merged: Callable[[ModelConfig, Any, Any], Params],
    shardings: tuple[Any, ...],
    structure: Any,
) -> Callable[[Any, Any], Params]:
    where = jax.tree.unflatten(structure, shardings)
    return jax.jit(functools.partial(merged, config), out_shardings=where)


def _hashable(tree: Any) -> tuple[tuple[Any, ...], Any]:
    """Leaves and structure of a tree, by which a program is looked up."""
    leaves, structure = jax.tree.flatten(tree)
    return tuple(leaves), structure


def identity(
    params: Params, rows: Sequence[Row], settings: FineTuning, frozen: optax.GradientTransformation
) -> dict[str, Any]:
    """What the weights of a run follow from, in values of JSON."""
    data = {
        "rows": data_sha256(rows)[:16],
        "weights": digest(checksum(dict(params)))[:16],
        "frozen": digest(checksum(frozen.init(params)))[:16],
    }
    return json.loads(json.dumps(described(settings) | data))


def described(settings: FineTuning) -> dict[str, Any]:
    """The settings that weights follow from: not how often they are saved, and no dropout where nothing is dropped."""
    chosen = dataclasses.asdict(settings)
    del chosen["checkpoint_every"], chosen["checkpoint_end"]
    if settings.lora is not None and not settings.lora.dropout:
        del chosen["lora"]["dropout"]
    return chosen


def _on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """`tree` with what does not lie on `mesh`, such as a count of steps, on all of its devices.

    Without a mesh every array stays where it is, and may lie nowhere else: as the tree that a step returns, so that
    the step is compiled once.
    """
    if mesh is None:
        return jax.tree.map(lambda a: jax.device_put(a, a.sharding), tree)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: a if isinstance(a.sharding, NamedSharding) else jax.device_put(a, everywhere), tree)
