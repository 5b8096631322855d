"""How much of an accelerator is used: decoding against its memory bandwidth, scoring against its matrix products.

    python -m benchmarks.gpu

Random weights of Llama-2-7B in bfloat16 (`--model` names another preset); bandwidth and matrix peak are measured
first, on the same device. One JSON line a measurement: decode at several batch sizes, with and without steering;
prefill, loss, Wanda and SNIP; and, where torch finds a GPU too, `transformers` on the same shapes after this library
has given its arrays back (set XLA_PYTHON_CLIENT_PREALLOCATE=false to leave it the memory). `--tiny` runs a model of a
few thousand weights anywhere, to see that everything works.
"""

import dataclasses
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.likelihood import answer_nll
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.kernels.sums import Scoring, add_batch, nothing
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.presets import preset
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import forward, init
from jaxsafe.model.weights import count_parameters
from jaxsafe.parallel import make_mesh
from jaxsafe.plan.costs import flops
from jaxsafe.rows import Batch
from jaxsafe.study.record import environment

TINY = ModelConfig(300, layers=2, embed=32, mlp=48, heads=4, kv_heads=2, head_dim=8, context=512, dtype="bfloat16")
_forward = jax.jit(forward, static_argnames=("config", "last"))


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """The median of `rounds` timed calls after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth(size: int, rounds: int) -> float:
    """Bytes/s of adding one to `size` bytes, those read and those written."""
    x = jnp.ones(size // 2, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds(lambda: add(x), rounds)


def matrix_peak(n: int, rounds: int) -> float:
    """FLOP/s of a bfloat16 product of [n, n] matrices, eight in a row."""
    x = jnp.ones((n, n), jnp.bfloat16) / n

    @jax.jit
    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 8, lambda _, y: y @ x, x)

    return 8 * 2 * n**3 / seconds(lambda: products(x), rounds)


def rows(config: ModelConfig, batch: int, length: int) -> Batch:
    """Random tokens without padding; the second half of a row is its answer."""
    tokens = np.random.default_rng(0).integers(8, config.vocab, (batch, length), np.int32)
    ends = np.full(batch, length // 2 - 1, np.int32)
    return jax.device_put(Batch(tokens, np.ones((batch, length), bool), ends))


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model and what its device can do: bytes/s and FLOP/s as measured."""

    config: ModelConfig
    params: Any
    bandwidth: float
    peak: float
    rounds: int

    def flops(self, batch: int, length: int, unembedded: int) -> float:
        """Operations of a forward pass."""
        one = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
        return flops(self.config, one, batch, length, length, unembedded)

    def decode(self, batch: int, prompt: int, new: int) -> Iterator[dict[str, Any]]:
        """Decode steps, bare and steered: what `new` tokens take beyond the first one."""
        c = self.config
        prompts = rows(c, batch, prompt)
        weight_bytes = 2 * count_parameters({k: v for k, v in self.params.items() if c.tied or k != "embed"})
        cache_bytes = 2 * 2 * c.layers * batch * c.kv_heads * c.head_dim * (prompt + new / 2)
        steering = {"resid": edit(add=jnp.full((c.layers, c.embed), 1e-3))}
        found = {}
        for name, edits in (("bare", None), ("steered", steering)):
            times = [
                seconds(lambda n=n, e=edits: generate(c, self.params, prompts, Decoding(n), e).tokens, self.rounds)
                for n in (1, new)
            ]
            found[name] = (times[1] - times[0]) / (new - 1)
        yield {
            "name": f"decode_batch_{batch}",
            "tokens_per_s": batch / found["bare"],
            "bandwidth_share": (weight_bytes + cache_bytes) / found["bare"] / self.bandwidth,
            "steered_over_bare": found["steered"] / found["bare"],
        }

    def passes(self, batch: int, length: int) -> Iterator[dict[str, Any]]:
        """Prefill, Wanda, SNIP and the loss, on the same rows."""
        c = self.config
        given, half = rows(c, batch, length), length // 2
        whole = self.flops(batch, length, 0)
        answer = self.flops(batch, length, batch * (half + 1))

        def sums(kind: str) -> Callable[[], Any]:
            kept = [nothing(kind, c)]

            def call() -> Any:
                kept[0] = add_batch(Scoring(kind), c, self.params, given, kept[0], half, None)
                return kept[0]

            return call

        calls: dict[str, tuple[Callable[[], Any], float]] = {
            "prefill": (lambda: _forward(c, self.params, given.tokens, given.valid, last=1), whole),
            "loss": (lambda: answer_nll(c, self.params, given, last=half), answer),
            "wanda": (sums("wanda"), whole),
            "snip": (sums("snip"), 3 * answer),
        }
        for name, (call, operations) in calls.items():
            took = seconds(call, self.rounds)
            share = operations / took / self.peak
            yield {"name": name, "tokens_per_s": batch * length / took, "matrix_peak_share": share}


def transformers_decode(config: ModelConfig, batches: list[int], prompt: int, new: int) -> Iterator[dict[str, Any]]:
    """Tokens per second of `transformers` on the same card; nothing where torch finds none."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch
    import transformers

    if not torch.cuda.is_available():
        return
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
        model = transformers.LlamaForCausalLM(shape).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    for batch in batches:
        ids = torch.randint(8, config.vocab, (batch, prompt), device="cuda")

        def call(n: int, ids: Any = ids) -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
                model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)
            torch.cuda.synchronize()
            return time.perf_counter() - start

        call(2)
        yield {"name": f"transformers_decode_batch_{batch}", "tokens_per_s": batch * (new - 1) / (call(new) - call(1))}


def emit(**fields: Any) -> None:
    """Prints one line of JSON, with versions and the device."""
    line = fields | vars(environment())
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def main(argv: list[str]) -> None:
    """Measures the device, then the library on it, then the other library."""
    del argv
    tiny, rounds = TINY_RUN.value, ROUNDS.value
    config = TINY if tiny else preset(MODEL.value)
    batches = [1, 2] if tiny else [1, 16, 64]
    prompt, new, batch, length = (8, 4, 2, 16) if tiny else (128, 128, 8, 1024)
    speed = bandwidth(2**20 if tiny else 2**31, rounds)
    peak = matrix_peak(128 if tiny else 8192, rounds)
    emit(name="device", bytes_per_s=speed, flops_per_s=peak)
    params = jax.jit(init, static_argnums=(0, 1))(config, 0)
    bench = Bench(config, params, speed, peak, rounds)
    for each in batches:
        for found in bench.decode(each, prompt, new):
            emit(**found, batch=each, prompt=prompt, new=new)
    for found in bench.passes(batch, length):
        emit(**found, batch=batch, length=length)
    del bench, params
    gc.collect()
    for found in transformers_decode(config, batches, prompt, new):
        emit(**found)


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "llama2-7b", "a preset")
    ROUNDS = flags.DEFINE_integer("rounds", 5, "timed calls of each measurement", lower_bound=1)
    TINY_RUN = flags.DEFINE_bool("tiny", False, "a model of a few thousand weights, on any device")
    app.run(main)
