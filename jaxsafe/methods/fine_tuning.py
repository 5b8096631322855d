"""Fine-tuning that can be killed and taken up again: all weights or low-rank adapters, any part of them frozen.

The weights after a run follow from the given weights, rows and settings alone, however often it was interrupted.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsafe.io.checkpoint import checksum, open_checkpoints, outline, preemption, restore, save
from jaxsafe.kernels import lora
from jaxsafe.kernels.lora import LoRA
from jaxsafe.kernels.training import batch_plan, masters, model_weights, one_step
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.parallel import put_rows
from jaxsafe.text.batches import Row, pad_rows

SCHEDULES = ("constant", "linear", "cosine")
FREE = optax.identity()
"""Nothing is frozen."""


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A run of `steps` batches of `batch_size` rows, each taken in `accumulation` parts, by AdamW.

    The learning rate rises over `warmup` steps to `learning_rate` and stays ("constant") or falls to
    `final_share` of it at the last step ("linear", "cosine"). `lora` None trains the weights themselves. `remat`
    computes layers again in the backward pass instead of keeping their activations. `slots` (all, of the answer) is
    the shape of every batch, formed without regard to length; None puts rows of like length together. A checkpoint
    is written every `checkpoint_every` steps.
    """

    steps: int = 100
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-5
    schedule: str = "constant"
    warmup: int = 0
    final_share: float = 0.0
    weight_decay: float = 0.0
    lora: LoRA | None = None
    remat: bool = False
    slots: tuple[int, int] | None = None
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} does not divide into accumulation {self.accumulation}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is not known; use one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup {self.warmup} must be at least 0 and below the {self.steps} steps of the run")


def learning_rates(settings: FineTuning) -> optax.Schedule:
    """The learning rate by step."""
    peak, rest = settings.learning_rate, settings.steps - settings.warmup
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, settings.final_share * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, settings.final_share),
    }[settings.schedule]
    if not settings.warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, settings.warmup), after], [settings.warmup])


def fine_tune_run(
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    settings: FineTuning,
    folder: str | os.PathLike | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    frozen: optax.GradientTransformation = FREE,
    mesh: Mesh | None = None,
    on_weights: Callable[[int, Callable[[], Params]], None] = lambda done, weights: None,
) -> dict[str, Any]:
    """The parameters after fine-tuning on the answers of `rows`, in `config.dtype`; adapters are merged.

    `frozen` is what may not move (see `kernels/freezing.py`); of adapters it freezes the change that they make to
    the weights. `params` lie on `mesh` and are left as they are. `on_step` hears of each step and its loss,
    `on_weights` of the number of steps done, with a function that gives the weights that the model has by then.
    Runs that differ in rows, seed or what is frozen share one compiled step where their shapes are alike.

    Checkpoints go to `folder` (none without one), and a run that finds some there goes on from the latest. On
    SIGTERM such a run writes a checkpoint before it ends, with SystemExit(143) where the signal does not end the
    process. Raises ValueError for rows without answers, rows beyond the model's context, a batch that the mesh does
    not divide, and a folder of another run.
    """
    check_rows(config, rows, settings, mesh)
    lengths = [len(row.ids) if settings.slots is None else 1 for row in rows]
    plan = batch_plan(lengths, settings.batch_size, settings.steps, settings.seed)
    width = None if settings.slots is None else settings.slots[0]
    where = jax.tree.map(lambda p: p.sharding, dict(params))
    tree, fixed, weights_of, optimizer = begin(config, params, settings, frozen, mesh)
    step = compiled_step(config, optimizer, weights_of, rows, settings, tree)

    def weights() -> Params:
        return _weights_program(config, weights_of, *_hashable(where))(tree["params"], fixed)

    with contextlib.ExitStack() as stack:
        start, checkpoints = 0, None
        asked: Callable[[int], bool] = _never
        if folder is not None:
            # Left in reverse: the last checkpoint is whole before the signal takes its way.
            asked = stack.enter_context(preemption())
            checkpoints = stack.enter_context(open_checkpoints(folder))
            run = identity(params, rows, settings, frozen)
            if checkpoints.latest is not None:
                like = outline(tree)
                del tree  # the memory is needed for what is read
                resumed: Any = restore(checkpoints, like, run)
                start, tree = resumed
        for i in range(start, settings.steps):
            batch = pad_rows([rows[j] for j in plan[i]], width, settings.batch_size)
            tree, loss = step(tree, put_rows(batch, mesh), fixed)
            on_step(i, float(loss))
            on_weights(i + 1, weights)
            done, end = i + 1, asked(i)
            if checkpoints and (end or done == settings.steps or done % settings.checkpoint_every == 0):
                save(checkpoints, done, tree, run)
            if end:
                raise SystemExit(143)
    return dict(weights())


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


def begin(
    config: ModelConfig, params: Params, settings: FineTuning, frozen: optax.GradientTransformation, mesh: Mesh | None
) -> tuple[Any, Any, Callable[[ModelConfig, Any, Any], Params], optax.GradientTransformation]:
    """What changes from step to step ("params" and "optimizer"), what does not, the weights of both, the optimiser."""
    own, _ = rules(settings, frozen)
    optimizer, weights_of = _shared_rules(dataclasses.replace(settings, seed=0, checkpoint_every=1), frozen.update)
    if settings.lora is None:
        trained, fixed = masters(params), None
    else:
        trained = lora.init(config, settings.lora, settings.seed, mesh)
        fixed = {"params": dict(params), "frozen": _on_mesh(frozen.init(params), mesh)}
    return _on_mesh({"params": trained, "optimizer": own.init(trained)}, mesh), fixed, weights_of, optimizer


def rules(
    settings: FineTuning, frozen: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, Callable[[ModelConfig, Any, Any], Params]]:
    """The optimiser of a run, and what makes the model's weights of what is trained and what is fixed."""
    optimizer = optax.adamw(learning_rates(settings), weight_decay=settings.weight_decay)
    if settings.lora is None:
        return optax.chain(optimizer, frozen), model_weights
    return optimizer, functools.partial(adapted, frozen, settings.lora.alpha)


@functools.lru_cache(maxsize=16)
def _shared_rules(settings: FineTuning, update: Any) -> Any:
    """`rules`, the same objects for one way of freezing, whatever it freezes; only their updates are of use."""
    return rules(settings, optax.GradientTransformation(lambda params: None, update))


def adapted(
    frozen: optax.GradientTransformation, alpha: float, config: ModelConfig, adapters: Any, fixed: Any
) -> dict[str, Any]:
    """The weights with the change that `adapters` make merged in, as far as `frozen` lets it through."""
    change, _ = frozen.update(lora.changes(adapters, alpha), fixed["frozen"], fixed["params"])
    return lora.changed(fixed["params"], change)


def compiled_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    weights_of: Callable[[ModelConfig, Any, Any], Params],
    rows: Sequence[Row],
    settings: FineTuning,
    tree: Any,
) -> Callable[[Any, Any, Any], tuple[Any, jax.Array]]:
    """`step(tree, batch, fixed)`: the next tree, laid out as `tree`, and the loss; the tree given to it is consumed."""
    longest = max(len(row.ids) - 1 - row.instruction_end for row in rows)
    last = longest if settings.slots is None else settings.slots[1]
    where = _hashable(jax.tree.map(lambda a: a.sharding, tree))
    return _step_program(config, optimizer, weights_of, last, settings.accumulation, settings.remat, *where)


@functools.lru_cache(maxsize=16)
def _step_program(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    weights_of: Callable[[ModelConfig, Any, Any], Params],
    last: int,
    accumulation: int,
    remat: bool,
    shardings: tuple[Any, ...],
    structure: Any,
) -> Callable[[Any, Any, Any], tuple[Any, jax.Array]]:
    def step(tree: Any, batch: Any, fixed: Any) -> tuple[Any, jax.Array]:
        params, state, loss = one_step(
            config,
            optimizer,
            tree["params"],
            tree["optimizer"],
            batch,
            last,
            fixed,
            weights_of,
            accumulation,
            remat,
        )
        return {"params": params, "optimizer": state}, loss

    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.unflatten(structure, shardings), None))


@functools.lru_cache(maxsize=16)
def _weights_program(
    config: ModelConfig,
    weights_of: Callable[[ModelConfig, Any, Any], Params],
    shardings: tuple[Any, ...],
    structure: Any,
) -> Callable[[Any, Any], Params]:
    where = jax.tree.unflatten(structure, shardings)
    return jax.jit(functools.partial(weights_of, config), out_shardings=where)


def _hashable(tree: Any) -> tuple[tuple[Any, ...], Any]:
    """Leaves and structure of a tree, by which a program is looked up."""
    leaves, structure = jax.tree.flatten(tree)
    return tuple(leaves), structure


def identity(
    params: Params, rows: Sequence[Row], settings: FineTuning, frozen: optax.GradientTransformation
) -> dict[str, Any]:
    """What the weights of a run follow from, in values of JSON; how often it is saved is not of them."""

    def digest(content: Any) -> str:
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    chosen = dataclasses.asdict(settings)
    del chosen["checkpoint_every"]
    data = {
        "rows": digest([[row.ids, row.instruction_end] for row in rows]),
        "weights": digest(checksum(dict(params))),
        "frozen": digest(checksum(frozen.init(params))),
    }
    return json.loads(json.dumps(chosen | data))


def _never(step: int) -> bool:
    return False


def _on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """`tree` with what does not lie on `mesh`, such as a count of steps, on all of its devices."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: a if isinstance(a.sharding, NamedSharding) else jax.device_put(a, everywhere), tree)
