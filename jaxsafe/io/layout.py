"""Where files differ from the weight table: maps fused in one tensor, and text models inside of models with images."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsafe.io.tensors import Index, TensorSource
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.families import FAMILIES
from jaxsafe.model.weights import flatten, hf_shapes, hf_tensors, nest, weights

# Names of a text model's tensors begin so in files of models with images.
INSIDE = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 4096
"""Rows of the vocabulary that are compared at once."""
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class Table:
    """The tensors of `source` under the names of the weight table (a `TensorSource`).

    Fused maps are split by rows; of a model with images, the text model's tensors alone are there; a tied matrix goes
    by the embedding's name. Raises ValueError for a fused tensor of another number of rows.
    """

    def __init__(self, config: ModelConfig, source: TensorSource) -> None:
        self.where = source.where
        self._source = source
        # A name of the table: the stored name, the shape, and where its rows begin.
        self._place = {name: (held, shape, 0) for name, held, shape in _text_tensors(source)}
        if config.tied and EMBEDDING not in self._place and HEAD in self._place:
            self._place[EMBEDDING] = self._place.pop(HEAD)
        table, shapes = weights(config), hf_shapes(config)
        for fused, paths in FAMILIES[config.family].fused.items():
            for layer in range(config.layers):
                if (name := fused.format(layer)) not in self._place:
                    continue
                held, shape, row = self._place.pop(name)
                parts = [table[path].hf.format(layer) for path in paths]
                rows = sum(shapes[part][0] for part in parts)
                if shape[:1] != (rows,):
                    raise ValueError(f"{self.where}: {name} has shape {list(shape)}; the config asks {rows} rows")
                for part in parts:
                    self._place[part] = held, (shapes[part][0], *shape[1:]), row
                    row += shapes[part][0]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: shape for name, (_, shape, _) in self._place.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part `index` of tensor `name`."""
        held, shape, row = self._place[name]
        start, stop, _ = index[0].indices(shape[0])
        return self._source.read(held, (slice(row + start, row + stop), *index[1:]))


def as_stored(config: ModelConfig, source: TensorSource) -> ModelConfig:
    """`config`, untied where `source` holds a head of other values than the embedding's: it is what was trained."""
    shapes, vocabulary = source.shapes(), (config.vocab, config.embed)
    if not config.tied or HEAD not in shapes or shapes.get(EMBEDDING) != vocabulary:
        return config

    def differ(row: int) -> bool:
        rows = slice(row, min(row + ROWS, config.vocab)), slice(0, config.embed)
        return not np.array_equal(source.read(EMBEDDING, rows), source.read(HEAD, rows))

    if shapes[HEAD] == vocabulary and not any(map(differ, range(0, config.vocab, ROWS))):
        return config
    return dataclasses.replace(config, tied=False)


def _text_tensors(source: TensorSource) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in a text model's file, stored name, shape) of the tensors of `source`, those of images left out."""
    stored = source.shapes()
    images = any(name.startswith(OTHER_PARTS) for name in stored)
    for held, shape in stored.items():
        if images and held.startswith(OTHER_PARTS):
            continue
        prefix = next((p for p in INSIDE if images and held.startswith(p)), "")
        yield INSIDE.get(prefix, "") + held.removeprefix(prefix), held, shape


def file_tensors(config: ModelConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, array) of every tensor as files hold it: as `hf_tensors`, but maps that the family fuses are one."""
    flat, fused = flatten(params), FAMILIES[config.family].fused
    apart = {path for paths in fused.values() for path in paths}
    yield from hf_tensors(config, nest({path: leaf for path, leaf in flat.items() if path not in apart}))
    for name, paths in fused.items():
        streams = [hf_tensors(config, nest({path: flat[path]})) for path in paths]
        for layer, parts in enumerate(zip(*streams, strict=True)):
            yield name.format(layer), jnp.concatenate([array for _, array in parts], axis=0)
