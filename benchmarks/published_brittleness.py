"""Scores and ranks of weights as published with arXiv 2402.05162, and in one pass, in plain PyTorch on `transformers`.

One sample at a time; sums are float32 in any dtype of the model. `published` procedures run the model once for every
block, as that work does; the `one_pass` procedures give the same numbers from a single run over the samples and are the
stronger comparison. Results go by the weights' Hugging Face names; maps are [O, I].

T position, I inputs and O outputs of a linear map
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jaxsafe.rows import Row

IGNORED = -100  # the label that the loss of `transformers` leaves out


@dataclasses.dataclass(frozen=True)
class Sample:
    """Tokens `ids` int64 [1, T], the same as `labels` without the prompt, and the `start` of the response."""

    ids: Tensor
    labels: Tensor
    start: int


def as_sample(row: Row) -> Sample:
    """`row` for PyTorch."""
    ids, start = torch.tensor([row.ids]), row.instruction_end + 1
    labels = ids.clone()
    labels[:, :start] = IGNORED
    return Sample(ids, labels, start)


def linears(model: Any, blocks: Sequence[int]) -> dict[str, nn.Linear]:
    """The linear maps of `blocks` by the name of their weight."""
    found = {}
    for i in blocks:
        for name, module in model.model.layers[i].named_modules():
            if isinstance(module, nn.Linear):
                found[f"model.layers.{i}.{name}.weight"] = module
    return found


def every(model: Any) -> range:
    """All blocks."""
    return range(len(model.model.layers))


@contextlib.contextmanager
def inputs_of(maps: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """While it is open, the inputs [T, I] that each of `maps` met last, by name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = inputs[0][0]

    hooks = [module.register_forward_pre_hook(functools.partial(keep, name)) for name, module in maps.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def snip_published(model: Any, samples: Sequence[Sample], blocks: Sequence[int]) -> dict[str, Tensor]:
    """SNIP scores of `blocks`: for each of them all samples forward and backward, with gradients of its maps alone."""
    scores: dict[str, Tensor] = {}
    for block in blocks:
        scores |= _snip(model, samples, linears(model, [block]))
    return scores


def snip_one_pass(model: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """SNIP scores of all blocks: all samples forward and backward once."""
    return _snip(model, samples, linears(model, every(model)))


def _snip(model: Any, samples: Sequence[Sample], maps: dict[str, nn.Linear]) -> dict[str, Tensor]:
    model.requires_grad_(False)
    weights = {name: module.weight.requires_grad_() for name, module in maps.items()}
    sums = {
        name: torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) for name, weight in weights.items()
    }

    # A gradient is added as soon as it is there and then freed: faster than after the backward pass.
    def add(name: str, weight: Tensor) -> None:
        sums[name] += weight.grad.abs_()
        weight.grad = None

    hooks = [w.register_post_accumulate_grad_hook(functools.partial(add, name)) for name, w in weights.items()]
    for sample in samples:
        model(sample.ids, labels=sample.labels, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    return {name: weight.abs() * sums[name] for name, weight in weights.items()}


@torch.inference_mode()
def wanda_published(model: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Wanda scores of all blocks, block by block from cached inputs.

    A block runs twice: with hooks, and again for the inputs of the next one, which pruning would have changed.
    """
    inner, means = model.model, {}
    positions = [torch.arange(sample.ids.shape[1])[None] for sample in samples]
    hidden = [inner.embed_tokens(sample.ids) for sample in samples]
    rotary = [inner.rotary_emb(h, p) for h, p in zip(hidden, positions, strict=True)]
    for i, block in enumerate(inner.layers):
        with inputs_of(linears(model, [i])) as seen:
            for n, sample in enumerate(samples):
                block(hidden[n], position_embeddings=rotary[n])
                for name, x in seen.items():
                    squares = x[sample.start :].float().norm(dim=0) ** 2
                    means[name] = (means.get(name, 0) * n + squares) / (n + 1)
        hidden = [block(h, position_embeddings=r) for h, r in zip(hidden, rotary, strict=True)]
    return _wanda(model, means)


@torch.inference_mode()
def wanda_one_pass(model: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Wanda scores of all blocks from one run of the blocks, hooks on every map."""
    sums: dict[str, Any] = {}
    with inputs_of(linears(model, every(model))) as seen:
        for sample in samples:
            model.model(sample.ids, use_cache=False)
            for name, x in seen.items():
                sums[name] = sums.get(name, 0) + x[sample.start :].float().square().sum(0)
    return _wanda(model, {name: s / len(samples) for name, s in sums.items()})


def _wanda(model: Any, means: dict[str, Tensor]) -> dict[str, Tensor]:
    maps = linears(model, every(model))
    return {name: maps[name].weight.abs() * mean.sqrt() for name, mean in means.items()}


@torch.inference_mode()
def response_inputs(model: Any, samples: Sequence[Sample], blocks: Sequence[int]) -> dict[str, Tensor]:
    """What every map of `blocks` meets at the response tokens of all samples, [tokens, I]: whole forward passes."""
    maps = linears(model, blocks)
    kept: dict[str, list[Tensor]] = {name: [] for name in maps}
    with inputs_of(maps) as seen:
        for sample in samples:
            model(sample.ids, use_cache=False)
            for name, x in seen.items():
                kept[name].append(x[sample.start :].float())
    return {name: torch.cat(parts) for name, parts in kept.items()}


@torch.inference_mode()
def act_svd_published(
    model: Any, samples: Sequence[Sample], blocks: Sequence[int], rank: int, niter: int = 20
) -> dict[str, Tensor]:
    """The `rank` first directions [O, rank] of `blocks`: for each a forward of all samples and randomised SVDs."""
    bases = {}
    for block in blocks:
        inputs = response_inputs(model, samples, [block])
        for name, module in linears(model, [block]).items():
            S = inputs[name] @ module.weight.float().T
            bases[name] = torch.svd_lowrank(S, q=min(rank, *S.shape), niter=niter)[2]
    return bases


@torch.inference_mode()
def act_svd_one_pass(model: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """All directions [O, min(I, O)] of all blocks, most energy first: Gram matrices from one run, exact."""
    maps = linears(model, every(model))
    # Maps that share their inputs share the Gram matrix.
    source = {name: re.sub("[kv]_proj", "q_proj", name).replace("up_proj", "gate_proj") for name in maps}
    grams: dict[str, Any] = {}
    with inputs_of({name: maps[name] for name in source.values()}) as seen:
        for sample in samples:
            model.model(sample.ids, use_cache=False)
            for name, x in seen.items():
                response = x[sample.start :].float()
                grams[name] = grams.get(name, 0) + response.T @ response
    return {name: _directions(module.weight, grams[source[name]]) for name, module in maps.items()}


def _directions(weight: Tensor, gram: Tensor) -> Tensor:
    Q, K = torch.linalg.qr(weight.float())
    return Q @ torch.linalg.eigh(K @ gram @ K.T)[1].flip(1)
