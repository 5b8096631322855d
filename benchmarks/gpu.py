"""How much of an accelerator is used: decoding against its memory bandwidth, the rest against its matrix products.

    python -m benchmarks.gpu

Random weights of Llama-2-7B in bfloat16 (`--model` names another preset). On the same device first: its bandwidth and
its matrix peak, and, where torch finds a GPU too, `transformers` in a process of its own. Then decoding at several
batch sizes, bare and steered; prefill, loss, Wanda, SNIP and a step of LoRA; and attention at several lengths, by
cuDNN's kernel, where there is one, and block by block. Prints one Markdown table.
`--tiny` runs a model of a few thousand weights anywhere, to see that everything works.

B rows, T tokens of a row, N heads, K kv_heads, H head_dim
"""

import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import Call, seconds
from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.likelihood import answer_nll
from jaxsafe.kernels.lora import LoRA
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.kernels.sums import Scoring, add_batch, nothing
from jaxsafe.methods.trainer import FREE, FineTuning, begin, compiled_step
from jaxsafe.model.attention import Slots, cudnn_serves, fused
from jaxsafe.model.blockwise import Scaling, blockwise
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.presets import preset
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import forward, init
from jaxsafe.model.weights import count_parameters
from jaxsafe.parallel import make_mesh
from jaxsafe.plan.costs import flops
from jaxsafe.rows import Batch, Row
from jaxsafe.study.record import environment

TINY = ModelConfig(300, layers=2, embed=32, mlp=48, heads=4, kv_heads=2, head_dim=8, context=512, dtype="bfloat16")
_forward = jax.jit(forward, static_argnames=("config", "last"))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run: rows that decode, tokens of their prompts and answers, rows and tokens of a pass, of attention."""

    decoded: tuple[int, ...] = (1, 16, 64)
    prompt: int = 128
    new: int = 128
    batch: int = 8
    length: int = 1024
    scored: int = 4
    attended: tuple[int, ...] = (2048, 8192, 32_768)
    memory: int = 2**31
    matrix: int = 8192


SMALL = Sizes((1, 2), 8, 4, 2, 16, 2, (512,), 2**20, 128)


@dataclasses.dataclass(frozen=True)
class Found:
    """A measurement: tokens per second, what share that is of what the device can do, and what else was seen."""

    name: str
    rows: int
    tokens: int
    per_s: float
    share: float = math.nan
    of: str = ""
    compile_s: float = math.nan
    also: str = ""

    def line(self) -> str:
        """A row of the table."""
        share = f"{self.share:.0%} of {self.of}" if self.of else ""
        compiled = "" if math.isnan(self.compile_s) else f"{self.compile_s:.0f}"
        return f"| {self.name} | {self.rows} x {self.tokens} | {self.per_s:,.0f} | {share} | {compiled} | {self.also} |"


def timed(call: Call, rounds: int) -> tuple[float, float]:
    """The median of `rounds` timed calls, and what the first one took beyond that: compiling."""
    first, *times = (seconds(call)[0] for _ in range(rounds + 1))
    median = statistics.median(times)
    return median, first - median


def bandwidth(size: int, rounds: int) -> float:
    """Bytes/s of adding one to `size` bytes, those read and those written."""
    x = jnp.ones(size // 2, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / timed(lambda: add(x), rounds)[0]


def matrix_peak(n: int, rounds: int) -> float:
    """FLOP/s of a bfloat16 product of random [n, n] matrices, eight in a row."""
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16) / math.sqrt(n)

    @jax.jit
    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 8, lambda _, y: y @ x, x)

    return 8 * 2 * n**3 / timed(lambda: products(x), rounds)[0]


def rows(config: ModelConfig, B: int, T: int) -> Batch:
    """Random tokens without padding; the second half of a row is its answer."""
    tokens = np.random.default_rng(0).integers(8, config.vocab, (B, T), np.int32)
    ends = np.full(B, T // 2 - 1, np.int32)
    return jax.device_put(Batch(tokens, np.ones((B, T), bool), ends))


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model and what its device can do: bytes/s and FLOP/s as measured."""

    config: ModelConfig
    params: Any
    bandwidth: float
    peak: float
    rounds: int

    def flops(self, B: int, T: int, unembedded: int) -> float:
        """Operations of a forward pass."""
        one = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
        return flops(self.config, one, B, T, T, unembedded)

    def decode(self, B: int, prompt: int, new: int) -> Found:
        """Decode steps, bare and steered: what `new` tokens take beyond the first one."""
        c = self.config
        prompts = rows(c, B, prompt)
        weight_bytes = 2 * count_parameters({k: v for k, v in self.params.items() if c.tied or k != "embed"})
        cache_bytes = 2 * 2 * c.layers * B * c.kv_heads * c.head_dim * (prompt + new / 2)
        steering = {"resid": edit(add=jnp.full((c.layers, c.embed), 1e-3))}

        def took(n: int, edits: Any) -> tuple[float, float]:
            return timed(lambda: generate(c, self.params, prompts, Decoding(n), edits).tokens, self.rounds)

        (first, _), (bare, compiled), (steered, _) = took(1, None), took(new, None), took(new, steering)
        step = (bare - first) / (new - 1)
        share = (weight_bytes + cache_bytes) / step / self.bandwidth
        over = f"steering {(steered - first) / (bare - first) - 1:+.1%}"
        return Found("decode", B, new, B / step, share, "bandwidth", compiled, over)

    def of_peak(self, name: str, shape: tuple[int, int], call: Call, operations: float, also: str = "") -> Found:
        """A call whose `operations` count; a row that says so where it does not fit memory."""
        try:
            took, compiled = timed(call, self.rounds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Found(name, *shape, math.nan, also="does not fit memory")
        share = operations / took / self.peak
        return Found(name, *shape, math.prod(shape) / took, share, "matrix peak", compiled, also)

    def passes(self, B: int, T: int, scored: int) -> Iterator[Found]:
        """Prefill, loss, Wanda, SNIP and a step of LoRA, the last two on `scored` rows; half of a row is its answer."""
        c, half = self.config, T // 2
        given, few = rows(c, B, T), rows(c, scored, T)
        whole, answer = self.flops(B, T, 0), self.flops(B, T, B * (half + 1))
        of_few = self.flops(scored, T, scored * (half + 1))

        def sums(kind: str, batch: Batch) -> Call:
            kept = [nothing(kind, c)]

            def call() -> Any:
                kept[0] = add_batch(Scoring(kind), c, self.params, batch, kept[0], half, None)
                return kept[0]

            return call

        yield self.of_peak(
            "prefill", (B, T), lambda: _forward(c, self.params, given.tokens, given.valid, last=1), whole
        )
        yield self.of_peak("loss", (B, T), lambda: answer_nll(c, self.params, given, last=half), answer)
        yield self.of_peak("Wanda", (B, T), sums("wanda", given), whole)
        # Forward, activations' gradients, and a product a weight and row; frozen weights need no third pass.
        yield self.of_peak("SNIP", (scored, T), sums("snip", few), 3 * of_few)
        for remat in (False, True):
            name = "LoRA step, layers again" if remat else "LoRA step"
            yield self.of_peak(name, (scored, T), self.lora_step(scored, T, remat), 2 * of_few, "rank 16, all maps")

    def lora_step(self, B: int, T: int, remat: bool) -> Call:
        """A step of adapters of rank 16 on `B` random rows, half of each its answer."""
        batch = rows(self.config, B, T)
        data = [Row(tuple(ids), T // 2 - 1) for ids in np.asarray(batch.tokens).tolist()]
        settings = FineTuning(1, B, lora=LoRA(16, 32.0), slots=(T, T // 2), remat=remat)
        tree, fixed, recipe = begin(self.config, self.params, data, settings, FREE, None)
        step, kept = compiled_step(recipe, tree), [tree]

        def call() -> Any:
            kept[0], loss = step(kept[0], batch, fixed)
            return loss

        return call

    def attention(self, T: int, B: int) -> Iterator[Found]:
        """Attention of a layer of `B` texts, forward and with its gradients: cuDNN's kernel and block by block."""
        c = self.config
        N, K, H = c.heads, c.kv_heads, c.head_dim
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = ((B, T, N, H), (B, K, T, H), (B, K, T, H))
        q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
        valid = jnp.ones((B, T), bool)

        def blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
            heads = blockwise(grouped, k, v, Slots(valid).queries(T), None, Scaling(H**-0.5))
            return heads.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

        kernels = {"blockwise": blocks}
        if cudnn_serves(q.dtype, H):
            kernels = {"cuDNN": lambda q, k, v: fused(q, k, v, valid, "cudnn")} | kernels
        forward_flops = 2.0 * B * N * H * T * T  # two products of two operations each, half of them unseen
        given: dict[str, jax.Array] = {}
        for name, kernel in kernels.items():
            run = jax.jit(kernel)
            given[name] = run(q, k, v)
            gap = max(float(jnp.abs(x - given[name]).max()) for x in given.values())
            also = f"largest difference {gap:.1g}" if len(given) > 1 else ""
            pull = jax.jit(jax.grad(lambda *qkv, kernel=kernel: kernel(*qkv).astype(jnp.float32).sum(), (0, 1, 2)))
            run_it, pull_it = functools.partial(run, q, k, v), functools.partial(pull, q, k, v)
            yield self.of_peak(f"attention, {name}", (B, T), run_it, forward_flops, also)
            yield self.of_peak(f"attention with gradients, {name}", (B, T), pull_it, 3.5 * forward_flops)


def transformers_found(config: ModelConfig, sizes: Sizes) -> list[Found]:
    """Decoding and prefill of `transformers` on the same card; nothing where torch finds none."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch
    import transformers

    if not torch.cuda.is_available():
        return []
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.embed,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(shape).eval()
    model.generation_config.eos_token_id = None

    def took(call: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def answer(ids: Any, n: int) -> Any:
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)

    found = []
    for B in sizes.decoded:
        ids = torch.randint(8, config.vocab, (B, sizes.prompt), device="cuda")
        took(lambda ids=ids: answer(ids, 2))
        step = (took(lambda ids=ids: answer(ids, sizes.new)) - took(lambda ids=ids: answer(ids, 1))) / (sizes.new - 1)
        found.append(Found("decode, transformers", B, sizes.new, B / step))
    ids = torch.randint(8, config.vocab, (sizes.batch, sizes.length), device="cuda")
    times = [took(lambda: model(ids, logits_to_keep=1)) for _ in range(4)][1:]
    rate = ids.numel() / statistics.median(times)
    return [*found, Found("prefill, transformers", sizes.batch, sizes.length, rate)]


def measurements(config: ModelConfig, sizes: Sizes, rounds: int, peak: float, speed: float) -> Iterator[Found]:
    """All that is measured of this library."""
    bench = Bench(config, jax.jit(init, static_argnums=(0, 1))(config, 0), speed, peak, rounds)
    for B in sizes.decoded:
        yield bench.decode(B, sizes.prompt, sizes.new)
    yield from bench.passes(sizes.batch, sizes.length, sizes.scored)
    bench = dataclasses.replace(bench, params=None)
    for T in sizes.attended:
        yield from bench.attention(T, max(1, sizes.attended[-1] // T))


def main(argv: list[str]) -> None:
    """Measures the other library in a process of its own, the device, and then this library on it."""
    del argv
    config, sizes = (TINY, SMALL) if TINY_RUN.value else (preset(MODEL.value), Sizes())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        others = pool.apply(transformers_found, (config, sizes))
    rounds = ROUNDS.value
    speed, peak = bandwidth(sizes.memory, rounds), matrix_peak(sizes.matrix, rounds)
    where = environment()
    print(f"{'tiny model' if TINY_RUN.value else MODEL.value} in {config.dtype} on {where.device}, jax {where.jax}:")
    print(f"{speed / 1e9:,.0f} GB/s read and written, {peak / 1e12:,.1f} TFLOP/s of matrix products\n")
    print("| | rows x tokens | tokens/s | share | compiling, s | |\n|---|---:|---:|---:|---:|---|")
    for found in (*others, *measurements(config, sizes, rounds, peak, speed)):
        print(found.line(), flush=True)


MODEL = flags.DEFINE_string("model", "llama2-7b", "a preset")
ROUNDS = flags.DEFINE_integer("rounds", 5, "timed calls of each measurement", lower_bound=1)
TINY_RUN = flags.DEFINE_bool("tiny", False, "a model of a few thousand weights, on any device")
if __name__ == "__main__":
    app.run(main)
