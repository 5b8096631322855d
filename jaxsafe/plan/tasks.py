"""The programs of each task, as the kernels run them, on shapes in place of arrays.

B rows of a batch, T slots of a prompt or a sample, L layers, I inputs and O outputs of a linear map
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsafe.kernels import lora
from jaxsafe.kernels.generate import decode, prefill
from jaxsafe.kernels.importance import gram_spec, gram_taps, gram_widths, matrix_spec
from jaxsafe.kernels.layer_sums import LayerSums
from jaxsafe.kernels.lowrank import bases_spec, basis_of, by_layers
from jaxsafe.kernels.sampling import Drawing, Sampling, as_arrays
from jaxsafe.kernels.sums import Scoring, add_batch, kind_of, with_batch_of_layers
from jaxsafe.kernels.sums import shardings as sum_shardings
from jaxsafe.kernels.training import Recipe, one_step
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import flatten, linear_maps, nest, shapes, shardings, sizes
from jaxsafe.plan.costs import decomposition_flops, flops
from jaxsafe.rows import Batch

Groups = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a task is given, in rows of `length` slots, on all devices together.

    `batch` rows are answered at a time with `new_tokens` each; of `samples` in all, `sample_batch` are scored or
    learned from at a time, and half of a sample's slots are its answer. `layers` have sums and bases at a time, each
    range of them in a pass over the samples; None: all. Training takes its samples in so many `parts`, and with `remat`
    computes layers again in the backward pass instead of keeping them.
    """

    batch: int = 32
    length: int = 256
    new_tokens: int = 256
    samples: int = 128
    sample_batch: int = 8
    layers: int | None = None
    parts: int = 1
    remat: bool = True

    def passes(self, config: ModelConfig) -> int:
        """How many ranges of layers there are."""
        return 1 if self.layers is None else math.ceil(config.layers / self.layers)

    def summed(self, config: ModelConfig) -> ModelConfig:
        """`config` with as many layers as have sums at a time."""
        return dataclasses.replace(config, layers=self.layers or config.layers)


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a task.

    groups: what it holds in memory besides its temporaries, {"parameters": shapes with shardings, ...}
    touched: how often a run reads or writes the whole of each group, at the least
    flops: of a run, on every device
    compile: gives the compiled function
    runs: how often it runs
    exact: whether its products are of full float32 precision
    covered: arrays of the groups that the compiler counts among temporaries or results
    turn: of a function with a loop of unknown length, whether this is one turn of it (True) or the rest (False)
    """

    name: str
    groups: Groups
    touched: Mapping[str, float]
    flops: float
    compile: Callable[[], Any]
    runs: int = 1
    exact: bool = False
    covered: Any = ()
    turn: bool | None = None


def parameters(config: ModelConfig, mesh: Mesh, dtype: str | None = None) -> dict[str, Any]:
    """The parameter tree on `mesh` as `jax.ShapeDtypeStruct`s."""
    where = flatten(shardings(config, mesh))
    return nest({path: _array(s.shape, dtype or s.dtype, where[path]) for path, s in flatten(shapes(config)).items()})


def generation(config: ModelConfig, mesh: Mesh, work: Work) -> tuple[Program, ...]:
    """One batch of prompts answered, by one function: the prefill, and every decode step."""
    B, T, new = work.batch, work.length, work.new_tokens
    heads = "model" if config.kv_heads % mesh.shape["model"] == 0 else None
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    shape = config.layers, B, config.kv_heads, T + new - 1, config.head_dim
    cache = (_array(shape, config.dtype, NamedSharding(mesh, PartitionSpec(None, "data", heads))),) * 2
    groups = {"parameters": parameters(config, mesh), "cache": cache}

    def run(params: Any, batch: Batch, keys: Any, eos: Any) -> Any:
        prompted = prefill(config, params, batch, None, new - 1)
        return decode(config, params, batch, prompted, Drawing(as_arrays(Sampling()), keys, eos, new))

    @functools.cache
    def compiled() -> Any:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
        drawn = _array((B,), keys.dtype, rows), _array((1,), jnp.int32, everywhere)
        return jax.jit(run).lower(groups["parameters"], _batch(mesh, B, T), *drawn).compile()

    prompt, mean = T / (T + new), (T + new / 2) / (T + new)
    once = flops(config, mesh, B, T, T, B), flops(config, mesh, B, 1, T + new // 2, B)
    both = functools.partial(Program, groups=groups, compile=compiled, covered=cache)
    return (
        both("prefill", touched={"parameters": 1, "cache": prompt}, flops=once[0], turn=False),
        both("decode step", touched={"parameters": 1, "cache": mean}, flops=once[1], runs=new - 1, turn=True),
    )


def scoring(kind: str, config: ModelConfig, mesh: Mesh, work: Work) -> tuple[Program, ...]:
    """The sums of `kind` over all samples, batch after batch."""
    if work.layers is not None:
        return scoring_in_turns(kind, config, mesh, work)
    B, T = work.sample_batch, work.length
    place = sum_shardings(kind, config, mesh)
    sums = jax.tree.map(lambda a, s: _array(a.shape, a.dtype, s), kind_of(kind).outline(config), place)
    groups = {"parameters": parameters(config, mesh), "sums": sums}
    snip = kind == "snip"
    last = T // 2

    def compiled() -> Any:
        args = Scoring(kind), config, groups["parameters"], _batch(mesh, B, T), sums, last, mesh
        return add_batch.lower(*args).compile()

    # SNIP goes forward and back to the inputs of every map, and forms a row's gradients once more; a row's
    # gradient is added to the sums before the next one is formed.
    forward = flops(config, mesh, B, T, T, (last + 1) * B if snip else 0)
    once = forward if kind == "wanda" else 3 * forward
    touched = {"parameters": 2.0, "sums": 2.0 * B} if snip else {"parameters": 1.0, "sums": 2.0}
    if kind == "gram":
        once = forward + _gram_flops(config, mesh, B * last)
    return (Program(f"{kind} sums", groups, touched, once, compiled, math.ceil(work.samples / B)),)


def scoring_in_turns(kind: str, config: ModelConfig, mesh: Mesh, work: Work) -> tuple[Program, ...]:
    """The sums of `kind`, of some layers in each pass: what a run takes is the mean over passes.

    It grows evenly with the first layer of a range, so that the range in the middle stands for all.
    """
    B, T, L = work.sample_batch, work.length, config.layers
    few = work.summed(config)
    n, first, last = few.layers, (L - few.layers) // 2, T // 2
    place = sum_shardings(kind, few, mesh)
    sums = jax.tree.map(lambda a, s: _array(a.shape, a.dtype, s), kind_of(kind).outline(few), place)
    groups = {"parameters": parameters(config, mesh), "sums": sums}

    def run(params: Any, batch: Batch, sums: Any) -> Any:
        return with_batch_of_layers(Scoring(kind), config, params, batch, LayerSums(first, sums), last, mesh).sums

    def compiled() -> Any:
        return jax.jit(run, donate_argnums=2).lower(groups["parameters"], _batch(mesh, B, T), sums).compile()

    blocks = flops(config, mesh, B, T, T, 0) / L
    head = flops(config, mesh, B, T, T, (last + 1) * B) - L * blocks
    behind = (L - n) / 2
    if kind == "snip":
        # Forward through all; back through those behind and the range, each computed once more; products of the range.
        once = (L + 2 * behind + 3 * n) * blocks + 3 * head
        touched = {"parameters": 1 + (behind + n) / L, "sums": 2.0 * B}
    else:
        once = (behind + n) * blocks + (_gram_flops(few, mesh, B * last) if kind == "gram" else 0)
        touched = {"parameters": (behind + n) / L, "sums": 2.0}
    runs = math.ceil(work.samples / B) * work.passes(config)
    return (Program(f"{kind} sums", groups, touched, once, compiled, runs),)


def decomposition(config: ModelConfig, mesh: Mesh, work: Work) -> tuple[Program, ...]:
    """The Gram sums, then a decomposition of every linear map, layers split over the devices."""
    grams = scoring("gram", config, mesh, work)
    held, sums = grams[0].groups["parameters"], grams[0].groups["sums"]
    maps, few = linear_maps(config), work.summed(config)
    L = few.layers
    edges = {p: tuple(math.prod(sizes(config, a)) for a in (w.inputs, w.outputs)) for p, w in maps.items()}

    def result(*shape: int) -> Any:
        return _array(shape, jnp.float32, NamedSharding(mesh, bases_spec(mesh, shape)))

    bases = {p: result(L, O, min(I, O)) for p, (I, O) in edges.items()}
    groups = {"parameters": held, "sums": sums, "bases": bases}
    if work.layers is not None:
        groups["weights of the range"] = parameters(few, mesh)["layers"]
    taps = gram_taps(config)
    of_inputs = {p: edge for p, edge in edges.items() if taps[p] == maps[p].tap}
    # The map that needs most: the others' temporaries are smaller.
    path = max(of_inputs, key=lambda p: of_inputs[p][0] * of_inputs[p][1] + of_inputs[p][0] ** 2)
    where = NamedSharding(mesh, PartitionSpec(None, *matrix_spec(config, maps[path], mesh)))
    flat = _array((L, *edges[path]), config.dtype, where)

    def compiled() -> Any:
        return by_layers.lower(mesh, basis_of, flat, sums[taps[path]]).compile()

    layers = math.ceil(L / mesh.size)
    work_flops = layers * sum(decomposition_flops(I, O, p in of_inputs) for p, (I, O) in edges.items())
    touched = {"parameters": L / config.layers, "sums": 7 / 4, "bases": 4}
    made = bases[path], result(L, min(edges[path]))
    passes = work.passes(config)
    return *grams, Program("decompositions", groups, touched, work_flops, compiled, passes, exact=True, covered=made)


def fine_tuning(config: ModelConfig, mesh: Mesh, work: Work) -> tuple[Program, ...]:
    """Steps of AdamW on all weights, with float32 masters."""
    B, T = work.sample_batch, work.length
    optimizer = optax.adamw(1e-5)
    masters = parameters(config, mesh, "float32")
    state = _optimizer_state(optimizer, masters, mesh)
    groups = {"parameters": masters, "optimiser state": state}
    step = Recipe(config, optimizer, T // 2, accumulation=work.parts, remat=work.remat)
    # Forward, once more where layers are computed again, and the backward pass of twice as much.
    once = (3 + work.remat) * flops(config, mesh, B, T, T, (T // 2 + 1) * B)
    # Masters are cast, updated; of each part, passes read the cast weights, and the gradient is written and read.
    touched = {"parameters": 2 + 0.5 * (1 + work.parts * (2 + work.remat)) + 2 * work.parts, "optimiser state": 2}
    compiled = _training(step, {"params": masters, "optimizer": state}, _batch(mesh, B, T))
    return (Program("training step", groups, touched, once, compiled, math.ceil(work.samples / B)),)


def adapters(config: ModelConfig, mesh: Mesh, work: Work) -> tuple[Program, ...]:
    """Steps of AdamW on low-rank adapters of all maps beside weights that stay."""
    B, T = work.sample_batch, work.length
    optimizer, shape = optax.with_extra_args_support(optax.adamw(1e-5)), lora.LoRA()
    like, place = jax.eval_shape(lambda: lora.init(config, shape, 0)), lora.shardings(config, shape, mesh)
    trained = jax.tree.map(lambda a, s: _array(a.shape, a.dtype, s), like, place)
    groups = {
        "parameters": parameters(config, mesh),
        "adapters": trained,
        "optimiser state": _optimizer_state(optimizer, trained, mesh),
    }

    def beside(config: ModelConfig, trained: Any, fixed: Any, keys: Any) -> dict[str, Any]:
        return lora.unmerged(fixed["params"], trained, shape.scale, keys, shape.dropout)

    step = Recipe(config, optimizer, T // 2, beside, work.parts, work.remat)
    tree = {"params": trained, "optimizer": groups["optimiser state"]}
    rate = _array((), jnp.float32, NamedSharding(mesh, PartitionSpec()))
    compiled = _training(step, tree, _batch(mesh, B, T), {"params": groups["parameters"], "rate": rate})
    # Forward, once more where layers are computed again, and the gradients of what enters the maps, but not of the
    # maps; the adapters' own products are left out.
    once = (2 + work.remat) * flops(config, mesh, B, T, T, (T // 2 + 1) * B)
    touched = {"parameters": work.parts * (2.0 + work.remat), "adapters": 5.0, "optimiser state": 2.0}
    return (Program("training step", groups, touched, once, compiled, math.ceil(work.samples / B)),)


def _optimizer_state(optimizer: optax.GradientTransformation, trained: Any, mesh: Mesh) -> Any:
    """The state of `optimizer`: moments lie as what is `trained`, counts everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda a, like: _array(a.shape, a.dtype, like.sharding),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda a: _array(a.shape, a.dtype, everywhere),
    )


def _training(recipe: Recipe, tree: Any, batch: Batch, fixed: Any = None) -> Callable[[], Any]:
    """Gives the compiled step of `recipe`, which consumes `tree`."""
    step, where = functools.partial(one_step, recipe), jax.tree.map(lambda a: a.sharding, tree)
    return lambda: jax.jit(step, donate_argnums=0, out_shardings=(where, None)).lower(tree, batch, fixed).compile()


TASKS: dict[str, Callable[[ModelConfig, Mesh, Work], tuple[Program, ...]]] = {
    "generation": generation,
    "snip": functools.partial(scoring, "snip"),
    "act_svd": decomposition,
    "fine_tuning": fine_tuning,
    "lora": adapters,
}


IN_TURNS = ("snip", "act_svd")
"""Tasks whose sums can be made of some layers at a time."""
LEARNING = ("fine_tuning", "lora")
"""Tasks whose samples can be learned from in several ways."""


def device_bytes(tree: Any) -> float:
    """Bytes of one device's share of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves))


def _array(shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
    """What stands for an array of this shape, dtype and sharding."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _batch(mesh: Mesh, B: int, T: int) -> Batch:
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return Batch(_array((B, T), jnp.int32, rows), _array((B, T), bool, rows), _array((B,), jnp.int32, rows))


def _gram_flops(config: ModelConfig, mesh: Mesh, tokens: int) -> float:
    """Operations of one device for its share of the outer products of `tokens` vectors, at every tap and layer."""
    shares = {
        F: math.prod(mesh.shape[axis] for axis in gram_spec(F, mesh) if axis) for F in gram_widths(config).values()
    }
    return sum(2.0 * config.layers * tokens * F**2 / shares[F] for F in gram_widths(config).values())
