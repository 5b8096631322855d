"""SNIP and Wanda scores and ActSVD ranks of a whole model: this library, one plain pass, and the published procedures.

    python -m benchmarks.importance_and_ranks

The baselines (arXiv 2402.05162) are written in PyTorch on `transformers` in `published_brittleness`. All sides take
SmolLM2-135M-Instruct in every dtype of `--dtypes` on two CPU cores and the same token ids: built-in harmful prompts
with refusals and plain prompts with the model's own answers. Scores and bases are compared on a few samples before
anything is timed. `ratio` is the best dtype of the single pass over our best.

The published SNIP and ActSVD run the model once a block, in float32. They are timed once, on evenly spread blocks (SNIP
also on samples evenly spread over the lengths) and extrapolated in proportion, which the measurement says. The floor
is the time of the matrix products and eigenvectors at the rate of bare products measured in the same run, and beside
them of reading and writing the sums once a sample (SNIP) or batch (ActSVD) at the bandwidth of a copy.

L layers, T tokens and R response tokens of a sample, I inputs and O outputs of a linear map, F features of a tap
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.forward_and_generate import bandwidth, flops, products
from benchmarks.measure import Call, Contest, begin, compare, seconds
from jaxsafe.chat.model import ChatModel, load_chat_model
from jaxsafe.kernels.importance import gram_taps, kept_bytes, snip_scores, wanda_scores
from jaxsafe.kernels.lowrank import act_svd
from jaxsafe.kernels.sums import Scoring, gather, kind_of
from jaxsafe.methods.safety_tuning import TuningSettings, builtin_refusals, tuning_rows
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import flatten, hf_view, linear_maps, sizes
from jaxsafe.prompts.sets import load_prompts
from jaxsafe.rows import Row, bucket

ANSWER_TOKENS = 48
LEAST = {"float32": 0.999, "bfloat16": 0.98}
"""Of the correlation of scores with a baseline's, and of the energy of our directions over a baseline's."""


@dataclasses.dataclass(frozen=True)
class Sides:
    """The model and its rows for both sides; `baseline` is the module of the PyTorch procedures."""

    model: ChatModel
    rows: list[Row]
    baseline: Any
    torch_model: Any
    samples: list[Any]

    def few(self, n: int) -> "Sides":
        """The same with `n` of the samples."""
        chosen = spread(n, len(self.rows))
        rows, samples = [self.rows[i] for i in chosen], [self.samples[i] for i in chosen]
        return dataclasses.replace(self, rows=rows, samples=samples)

    def gathered(self, what: str, batch_size: int) -> Any:
        """This library's sums over the rows."""
        return gather(Scoring(what, batch_size=batch_size), self.model.config, self.model.params, self.rows)


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One quantity on all sides.

    ours, one_pass, published: the calls; the published one works on `blocks` of the blocks, with `few` on few samples
    agreement: how far those results agree
    floor: the operations and the bytes that the rows need at a batch size
    """

    ours: Callable[[Sides, int], Any]
    one_pass: Callable[[Sides], Any]
    published: Callable[[Sides], Any]
    blocks: int
    few: bool
    agreement: Callable[[Sides, Any, Any, Any], dict[str, float]]
    floor: Callable[[ModelConfig, Sequence[Row], int], tuple[float, float]]


def spread(n: int, whole: int) -> list[int]:
    """`n` of the positions 0 ... `whole` - 1, the middles of `n` equal parts."""
    n = min(n, whole)
    return [(2 * i + 1) * whole // (2 * n) for i in range(n)]


def load(torch: Any, count: int) -> dict[str, Sides]:
    """By dtype both models and `count` samples, shortest first: half refusals, half the model's own answers."""
    from benchmarks import published_brittleness

    model = load_chat_model("smollm2-135m-instruct", dtype="float32")
    harmful, plain = (load_prompts(f"builtin:{kind}").prompts for kind in ("harmful", "plain"))
    if count > 2 * min(len(harmful), len(plain)):
        sys.exit(f"--samples={count}: there are {min(len(harmful), len(plain))} prompts of each of the two kinds")
    halves = harmful[: count // 2], plain[: count - count // 2]
    rows = tuning_rows(model, *halves, builtin_refusals(), TuningSettings(answer_tokens=ANSWER_TOKENS))
    rows.sort(key=lambda row: len(row.ids))
    samples = [published_brittleness.as_sample(row) for row in rows]

    def sides(dtype: str) -> Sides:
        import transformers

        mine = load_chat_model("smollm2-135m-instruct", dtype=dtype)
        path = model.tokenizer.path
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        return Sides(mine, rows, published_brittleness, theirs, samples)

    return {dtype: sides(dtype) for dtype in DTYPES.value}


def our_snip(sides: Sides, batch_size: int) -> Any:
    """SNIP scores by this library."""
    sums = sides.gathered("snip", batch_size)
    return snip_scores(sides.model.config, sides.model.params, sums.sums, sums.n)


def our_wanda(sides: Sides, batch_size: int) -> Any:
    """Wanda scores by this library."""
    sums = sides.gathered("wanda", batch_size)
    return wanda_scores(sides.model.config, sides.model.params, sums.sums, sums.n)


def our_act_svd(sides: Sides, batch_size: int) -> Any:
    """Bases of all ranks by this library."""
    return act_svd(sides.model.config, sides.model.params, sides.gathered("gram", batch_size).sums)


def least_correlation(sides: Sides, ours: Any, one_pass: Mapping[str, Any], published: Any) -> dict[str, float]:
    """Pearson correlation of the scores with each baseline's, the least of any map."""
    mine = hf_view(sides.model.config, jax.device_get(ours))

    def least(theirs: Mapping[str, Any]) -> float:
        return min(
            float(np.corrcoef(mine[name].ravel(), s.float().numpy().ravel())[0, 1]) for name, s in theirs.items()
        )

    return {"correlation_one_pass": least(one_pass), "correlation_published": least(published)}


def least_energy(sides: Sides, ours: Any, one_pass: Mapping[str, Any], published: Any) -> dict[str, float]:
    """Energy ||S V||^2 of the outputs S in our first directions over that in each baseline's, the least of any map.

    At the published rank, on the published blocks; S is made by PyTorch.
    """
    config, baseline = sides.model.config, sides.baseline
    blocks = sorted({int(name.split(".")[2]) for name in published})
    maps = baseline.linears(sides.torch_model, blocks)
    inputs = baseline.response_inputs(sides.torch_model, sides.samples, blocks)
    bases = flatten(jax.device_get(ours))
    mine = {w.hf.format(i): bases[path].vectors[i] for path, w in linear_maps(config).items() for i in blocks}
    ratios: dict[str, list[float]] = {"energy_over_one_pass": [], "energy_over_published": []}
    for name, theirs in published.items():
        S = (inputs[name] @ maps[name].weight.detach().float().T).numpy()
        captured = functools.partial(energy, S, rank=theirs.shape[1])
        ratios["energy_over_one_pass"].append(captured(mine[name]) / captured(one_pass[name].numpy()))
        ratios["energy_over_published"].append(captured(mine[name]) / captured(theirs.numpy()))
    return {key: min(values) for key, values in ratios.items()}


def energy(S: np.ndarray, vectors: np.ndarray, rank: int) -> float:
    """||S V||^2 of the first `rank` of `vectors` [O, R]."""
    return float(np.square(S.astype(np.float64) @ vectors[:, :rank]).sum())


def run_flops(config: ModelConfig, rows: Sequence[Row]) -> tuple[float, float]:
    """Operations of one forward pass over `rows`: of the blocks, and of the logits that predict responses."""
    lengths = [(len(row.ids), len(row.ids) - 1 - row.instruction_end) for row in rows]
    blocks = sum(flops(config, 1, T, T, 0) for T, _ in lengths)
    return blocks, sum(flops(config, 1, T, T, R) for T, R in lengths) - blocks


def snip_floor(config: ModelConfig, rows: Sequence[Row], batch_size: int) -> tuple[float, float]:
    """Forward once, backward twice as much but for the unembedding's own gradient; every sum read and written."""
    blocks, logits = run_flops(config, rows)
    return 3 * blocks + 2 * logits, 2.0 * kept_bytes(config) * len(rows)


def wanda_floor(config: ModelConfig, rows: Sequence[Row], batch_size: int) -> tuple[float, float]:
    """The blocks forward; the sums are small."""
    return run_flops(config, rows)[0], 0.0


def act_svd_floor(config: ModelConfig, rows: Sequence[Row], batch_size: int) -> tuple[float, float]:
    """The blocks forward, Gram matrices [F, F] of the responses, and a decomposition a map of size M = min(I, O).

    Of a decomposition, two products where the Gram matrix is that of inputs, and 9 M^3 for eigenvalues and eigenvectors
    (Golub and Van Loan, section 8.3).
    """
    numbers = sum(a.size for a in kind_of("gram").outline(config).values())
    grams = 2.0 * numbers * sum(len(row.ids) - 1 - row.instruction_end for row in rows)
    decompositions, taps = 0.0, gram_taps(config)
    for path, w in linear_maps(config).items():
        I, O = (math.prod(sizes(config, axes)) for axes in (w.inputs, w.outputs))
        M = min(I, O)
        decompositions += config.layers * ((2.0 * M * I * (I + M) if taps[path] == w.tap else 0.0) + 9.0 * M**3)
    operations = run_flops(config, rows)[0] + grams + decompositions
    return operations, 8.0 * numbers * math.ceil(len(rows) / batch_size)


def quantities(layers: int, blocks: Sequence[int], rank: int) -> dict[str, Quantity]:
    """What is measured, by name; the published procedures on `blocks`, ActSVD for the one `rank`."""

    def call(name: str, *args: Any) -> Callable[[Sides], Any]:
        return lambda sides: getattr(sides.baseline, name)(sides.torch_model, sides.samples, *args)

    n = len(blocks)
    scores, ranks = least_correlation, least_energy
    snip = our_snip, call("snip_one_pass"), call("snip_published", blocks), n, True, scores, snip_floor
    wanda = our_wanda, call("wanda_one_pass"), call("wanda_published"), layers, False, scores, wanda_floor
    published = call("act_svd_published", blocks, rank)
    act_svd = our_act_svd, call("act_svd_one_pass"), published, n, False, ranks, act_svd_floor
    return {"snip": Quantity(*snip), "wanda": Quantity(*wanda), "act_svd": Quantity(*act_svd)}


def bare(config: ModelConfig, rows: Sequence[Row], batch_size: int) -> tuple[Call, float]:
    """The products of a forward pass over a batch of `rows`, and their operations."""
    T = bucket(len(rows[len(rows) // 2].ids))
    return products(config, batch_size, T, T, 0), flops(config, batch_size, T, T, 0)


def measure(name: str, quantity: Quantity, both: Mapping[str, Sides], few: int, batch_size: int, rounds: int) -> None:
    """Checks on `few` samples that all sides agree, times them in turn on the whole, and emits the measurement."""
    fields, contests, speed = dict[str, Any](), {}, bandwidth(3)
    for dtype, sides in both.items():
        part = sides.few(few)
        agreed = quantity.agreement(
            part, quantity.ours(part, batch_size), quantity.one_pass(part), quantity.published(part)
        )
        if min(agreed.values()) < LEAST[dtype]:
            sys.exit(f"{name}, {dtype}: {agreed}, of which none should be below {LEAST[dtype]}; it is not timed")
        fields |= {f"{key}_{dtype}": value for key, value in agreed.items()}
        operations, moved = quantity.floor(sides.model.config, sides.rows, batch_size)
        call, once = bare(sides.model.config, sides.rows, batch_size)
        ours = functools.partial(quantity.ours, sides, batch_size)
        theirs = functools.partial(quantity.one_pass, sides)
        contests[dtype] = Contest(ours, theirs, call, operations, operations / once, moved / speed)
    whole = next(iter(both.values()))
    config, samples = whole.model.config, few if quantity.few else len(whole.rows)
    share = quantity.blocks * samples / (config.layers * len(whole.rows))
    published = seconds(lambda: quantity.published(whole.few(few) if quantity.few else whole))[0] / share
    compare(
        name,
        "one_pass",
        contests,
        rounds,
        published_s=published,
        extrapolated_from=f"{quantity.blocks} of {config.layers} blocks, {samples} of {len(whole.rows)} samples",
        samples=len(whole.rows),
        tokens=sum(len(row.ids) for row in whole.rows),
        response_tokens=sum(len(row.ids) - 1 - row.instruction_end for row in whole.rows),
        batch=batch_size,
        **fields,
    )


def main(argv: list[str]) -> None:
    """Loads both models and measures what `--only` names."""
    del argv
    both = load(begin(), SAMPLES.value)
    layers = next(iter(both.values())).model.config.layers
    listed = quantities(layers, spread(PUBLISHED_BLOCKS.value, layers), RANK.value)
    for name in ONLY.value:
        measure(name, listed[name], both, PUBLISHED_SAMPLES.value, BATCH_SIZE.value, ROUNDS.value)


if __name__ == "__main__":
    SAMPLES = flags.DEFINE_integer("samples", 128, "prompts with responses", lower_bound=2)
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "rows of a batch on our side", lower_bound=1)
    PUBLISHED_BLOCKS = flags.DEFINE_integer("published_blocks", 3, "blocks of SNIP and ActSVD as published", 1)
    PUBLISHED_SAMPLES = flags.DEFINE_integer("published_samples", 8, "samples of the checks and of published SNIP", 1)
    RANK = flags.DEFINE_integer("rank", 96, "directions that the published ActSVD finds", lower_bound=1)
    ROUNDS = flags.DEFINE_integer("rounds", 2, "timed rounds of each side", lower_bound=1)
    DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of weights and activations")
    flags.register_validator("dtypes", lambda names: names and set(names) <= set(LEAST), "not known")
    ONLY = flags.DEFINE_list("only", ["snip", "wanda", "act_svd"], "what to measure")
    known = set(quantities(1, [0], 1))
    flags.register_validator("only", lambda names: set(names) <= known, f"names other than {sorted(known)}")
    app.run(main)
