"""LoRA adapters in PEFT's folders: read into the weights of a model, and written.

R rank, I and O input and output features of a linear map
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxsafe.digest import arrays_sha256
from jaxsafe.io.atomic import new_folder, write_text
from jaxsafe.io.layout import INSIDE
from jaxsafe.io.patterns import matched
from jaxsafe.io.tensors import Index, TensorSource
from jaxsafe.kernels.lora import LoRA
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.families import FAMILIES
from jaxsafe.model.weights import hf_shapes, linear_maps, sizes, weights
from jaxsafe.parallel import fetch
from jaxsafe.reading import read_json, reading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Attributes that say where an adapter comes from or how it was trained, and nothing of what it computes; PEFT itself
# takes fan_in_fan_out for false on linear maps, which all maps of the families here are.
SILENT = frozenset(
    """
    auto_mapping corda_config ensure_weight_tying eva_config fan_in_fan_out inference_mode loftq_config lora_dropout
    lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config
    """.split()
)
# Ways to begin training that leave the weights of the base as they are.
BEGUN = (None, True, False, "gaussian", "eva", "orthogonal")
LARGEST = 1e18
"""Alphas are smaller: products with larger ones would be infinite in float32."""
Matches = Mapping[str, Mapping[str, Mapping[str, str | None]]]
"""What `matched` returns."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says of the change that its adapter makes."""

    peft_type: str
    target_modules: list[str] | str
    r: int = 8
    lora_alpha: float = 8
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def reach(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """R, and what the product of the factors is taken times, of those `modules` that the adapter changes.

        As PEFT decides it. Raises ValueError for patterns that cannot be matched.
        """
        whole = [names for names in (self._targets, self.exclude_modules) if isinstance(names, str) and names]
        endings = {*(self.rank_pattern or ()), *(self.alpha_pattern or ())}
        found = matched([*whole, *map(_ending, endings), *self._places], modules)
        changed = (m for m in modules if _named(self._targets, m, found) and not _named(self.exclude_modules, m, found))
        out = {}
        for module in filter(lambda module: self._is_in_layers(module, found), changed):
            rank = _by_pattern(self.rank_pattern, module, found, self.r)
            alpha = _by_pattern(self.alpha_pattern, module, found, self.lora_alpha)
            out[module] = rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return out

    @property
    def _targets(self) -> list[str] | str:
        is_all = isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"
        return r"(?!(.*\.)?lm_head$).*" if is_all else self.target_modules

    @property
    def _places(self) -> list[str]:
        """What a module of a layer is called; empty where the settings choose no layers."""
        if self.layers_to_transform in (None, []) or isinstance(self.target_modules, str):
            return []
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        places = [rf"(?:^|.*?\.){pattern}" for pattern in filter(None, patterns)] or [r".*?\.[^.]*"]
        return [rf"{place}\.(?P<idx>\d+)\..*" for place in places]

    def _is_in_layers(self, module: str, found: Matches) -> bool:
        if not self._places:
            return True
        layers = self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        groups = next((found[place][module] for place in self._places if module in found[place]), {"idx": None})
        return groups["idx"] is not None and int(groups["idx"]) in layers


def _named(names: list[str] | str | None, module: str, found: Matches) -> bool:
    if isinstance(names, str):
        return module in found.get(names, ())
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, found: Matches, usual: Any) -> Any:
    return next((value for key, value in (patterns or {}).items() if module in found[_ending(key)]), usual)


@dataclasses.dataclass(frozen=True)
class Change:
    """What an adapter adds to one linear map: scale * b a, with a [R, I] and b [O, R] float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def part(self, index: Index) -> np.ndarray:
        """Rows and columns `index` of the change, float32."""
        rows, columns = index
        return np.float32(self.scale) * (self.b[rows] @ self.a[:, columns])


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in the folder `where`: its settings, and the change that it makes to each module."""

    where: str
    settings: Settings
    changes: Mapping[str, Change]

    @property
    def sha256(self) -> str:
        """Digest of all that it changes."""
        parts = sorted(self.changes.items())
        arrays = [np.frombuffer(name.encode(), np.uint8) for name, _ in parts]
        return arrays_sha256([*arrays, *(array for _, c in parts for array in (c.a, c.b, np.float64(c.scale)))])


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether `folder` holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_settings(folder: str | os.PathLike) -> Settings:
    """The settings of the adapter in `folder`.

    Raises FileNotFoundError where there is none, ValueError for one that is no plain LoRA, naming the attribute.
    """
    file = pathlib.Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}; the folder of a PEFT adapter has one")
    attributes = read_json(file)
    if (kind := attributes.get("peft_type")) != "LORA":
        raise ValueError(f"{file} has peft_type {kind!r}; only adapters of the type 'LORA' are read")
    known = {field.name for field in dataclasses.fields(Settings)} | SILENT
    if odd := sorted(name for name, value in attributes.items() if name not in known and value):
        raise ValueError(f"{file} has {odd[0]} {attributes[odd[0]]!r:.60}, which is not read; plain LoRA has none")
    with reading(file):
        settings = msgspec.convert(attributes, Settings)
    wrong = {
        "bias": settings.bias != "none",
        "init_lora_weights": settings.init_lora_weights not in BEGUN,
        "task_type": settings.task_type not in (None, "CAUSAL_LM"),
        "r": settings.r < 1,
        "rank_pattern": any(rank < 1 for rank in (settings.rank_pattern or {}).values()),
        "lora_alpha": not abs(settings.lora_alpha) < LARGEST,
        "alpha_pattern": not all(abs(alpha) < LARGEST for alpha in (settings.alpha_pattern or {}).values()),
    }
    if refused := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"{file} has {refused[0]} {getattr(settings, refused[0])!r:.80}, which is not read")
    return settings


def base_of(folder: str | os.PathLike) -> str:
    """The name of the model that the adapter in `folder` was trained on. Raises ValueError where it does not say."""
    base = read_settings(folder).base_model_name_or_path
    if not base:
        raise ValueError(f"{folder} is an adapter (LoRA) that names no base; give the base as model and it as adapter")
    return base


def read_adapter(folder: str | os.PathLike) -> Adapter:
    """The adapter in `folder`.

    Raises as `read_settings`, and ValueError for tensors that are no LoRA of linear maps, that its settings do not
    name or that are missing, of another rank, or not finite.
    """
    settings, file = read_settings(folder), pathlib.Path(folder) / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {folder} (a pickled adapter_model.bin is not read)")
    factors: dict[str, dict[str, np.ndarray]] = {}
    with reading(file, "is not a whole safetensors file"), safe_open(file, framework="numpy") as stored:
        for name in stored.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.weight", name)
            if match is None:
                raise ValueError(f"{file} holds {name!r}; only lora_A and lora_B of linear maps are read")
            array = stored.get_tensor(name).astype(np.float32)
            if array.ndim != 2 or not np.isfinite(array).all():
                raise ValueError(f"{file}: {name} is no matrix of finite numbers")
            factors.setdefault(match[1], {})[match[2]] = array
    with reading(file.with_name(CONFIG)):
        reach = settings.reach(list(factors))
    if others := sorted(factors.keys() - reach.keys()):
        targets = f"target_modules {settings.target_modules!r:.80}"
        raise ValueError(f"{file} holds {others[0]}, which {targets} of {CONFIG} does not name")
    return Adapter(str(folder), settings, {m: _change(file, m, pair, *reach[m]) for m, pair in factors.items()})


def _change(file: pathlib.Path, module: str, pair: Mapping[str, np.ndarray], rank: int, scale: float) -> Change:
    if pair.keys() != {"A", "B"}:
        raise ValueError(f"{file} holds one factor alone of {module}")
    if (pair["A"].shape[0], pair["B"].shape[1]) != (rank, rank):
        shapes = [list(pair[name].shape) for name in "AB"]
        raise ValueError(f"{file}: {module} has factors {shapes[0]} and {shapes[1]}; {CONFIG} says rank {rank}")
    return Change(pair["A"], pair["B"], scale)


class Merged:
    """The tensors of `source`, under the names of the weight table, with an adapter added (a `TensorSource`).

    Sums are float32. Raises ValueError for an adapter of maps that the model does not have, or of other shapes.
    """

    def __init__(self, config: ModelConfig, source: TensorSource, adapter: Adapter) -> None:
        self.where = f"{source.where} with {adapter.where}"
        self._source, self._changes = source, _by_weight(config, adapter)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return self._source.shapes()

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part `index` of tensor `name`."""
        stored = self._source.read(name, index)
        if name not in self._changes:
            return stored
        return stored.astype(np.float32) + self._changes[name].part(index)


def _by_weight(config: ModelConfig, adapter: Adapter) -> dict[str, Change]:
    """The changes of an adapter by the name of the weight that each is of; those of fused maps are split by rows."""
    shapes, table = hf_shapes(config), weights(config)
    parts: dict[str, list[str]] = {w.hf: [w.hf] for w in table.values() if w.linear and not w.stacked}
    for layer in range(config.layers):
        parts |= {w.hf.format(layer): [w.hf.format(layer)] for w in table.values() if w.linear and w.stacked}
        for fused, paths in FAMILIES[config.family].fused.items():
            parts[fused.format(layer)] = [table[path].hf.format(layer) for path in paths]
    out: dict[str, Change] = {}
    for module, change in adapter.changes.items():
        name = f"{module}.weight"
        prefix = next((inside for inside in INSIDE if name.startswith(inside)), "")
        name = INSIDE.get(prefix, "") + name.removeprefix(prefix)
        if name not in parts:
            raise ValueError(f"{adapter.where} changes {module}, which is no linear map of this model")
        rows = [shapes[part][0] for part in parts[name]]
        wanted = (sum(rows), shapes[parts[name][0]][1])
        if (change.b.shape[0], change.a.shape[1]) != wanted:
            found = [change.b.shape[0], change.a.shape[1]]
            raise ValueError(f"{adapter.where}: {module} is of a map {found}; this model's is {list(wanted)}")
        ends = np.cumsum(rows)
        for part, end, n in zip(parts[name], ends, rows, strict=True):
            out[part] = dataclasses.replace(change, b=change.b[end - n : end])
    return out


def save_peft(
    folder: str | os.PathLike, config: ModelConfig, adapters: Mapping[str, Any], alpha: float, base: str = ""
) -> pathlib.Path:
    """Writes adapters (see `kernels.lora.init`) as a folder that PEFT loads onto the model `base`, float32.

    Maps that the family's files fuse become one of the sum of their ranks. The folder appears whole or not at all; one
    that holds anything but an adapter is refused with FileExistsError. Raises ValueError for adapters of another model.
    """
    modules = _modules(config, adapters)
    ranks = {name: a.shape[0] for name, (a, _) in modules.items()}
    rank = min(ranks.values())
    attributes = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": alpha * rank / next(iter(adapters["layers"].values()))["a"].shape[-1],
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    wider = {name.rpartition(".")[2]: n for name, n in ranks.items() if n != rank}
    attributes["rank_pattern"] = wider
    attributes["alpha_pattern"] = {name: attributes["lora_alpha"] * n / rank for name, n in wider.items()}
    tensors = {}
    for name, (a, b) in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b)
    if jax.process_index() > 0:
        return pathlib.Path(folder)
    with new_folder(folder, lambda name: name in (CONFIG, WEIGHTS)) as out:
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
        write_text(out / CONFIG, json.dumps(attributes, indent=2) + "\n")
    return pathlib.Path(folder)


def _modules(config: ModelConfig, adapters: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """a [R, I] and b [O, R] of every module, by its name in files; fused maps have the factors of all their parts."""
    table, pairs = linear_maps(config), {}
    for path, pair in {f"layers/{name}": pair for name, pair in adapters["layers"].items()}.items():
        LoRA(maps=(path.removeprefix("layers/"),))
        a, b = (np.asarray(fetch(pair[name]), np.float32) for name in "ab")
        inputs, outputs = sizes(config, table[path].inputs), sizes(config, table[path].outputs)
        rank = a.shape[-1]
        if a.shape != (config.layers, *inputs, rank) or b.shape != (config.layers, rank, *outputs):
            raise ValueError(f"adapter of {path!r} has factors {a.shape} and {b.shape}, which do not fit the model")
        flat = a.reshape(config.layers, -1, rank).swapaxes(1, 2), b.reshape(config.layers, rank, -1).swapaxes(1, 2)
        pairs[path] = flat
    named = {name: paths for name, paths in FAMILIES[config.family].fused.items() if pairs.keys() & set(paths)}
    apart = {path for paths in named.values() for path in paths}
    named |= {table[path].hf: (path,) for path in pairs if path not in apart}
    return {
        name.format(layer).removesuffix(".weight"): _joined(config, [(path, pairs.get(path)) for path in paths], layer)
        for name, paths in named.items()
        for layer in range(config.layers)
    }


def _joined(config: ModelConfig, parts: list[tuple[str, Any]], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of one map out of those of its parts, which stand below one another; None is a part without."""
    table = linear_maps(config)
    a = np.concatenate([pair[0][layer] for _, pair in parts if pair is not None])
    b = np.zeros((sum(math.prod(sizes(config, table[path].outputs)) for path, _ in parts), a.shape[0]), np.float32)
    row, column = 0, 0
    for path, pair in parts:
        rows = math.prod(sizes(config, table[path].outputs))
        if pair is not None:
            rank = pair[0].shape[1]
            b[row : row + rows, column : column + rank] = pair[1][layer]
            column += rank
        row += rows
    return a, b
