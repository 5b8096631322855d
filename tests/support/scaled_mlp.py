"""A method as small as one can be: the MLP of a range of layers, scaled; beside it a range drawn at random."""

import pathlib

import numpy as np

from jaxsafe.chat.model import ChatModel
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import flatten, nest
from jaxsafe.records.run import Run, Variant
from jaxsafe.study.exam import Exam
from jaxsafe.study.record import record, write_run
from jaxsafe.study.study import Study


def scaled(model: ChatModel, layers: LayerRange, factor: float) -> ChatModel:
    """The model with what the MLP of `layers` adds to the stream times `factor`."""
    shares = np.where(layers.mask(model.config.layers), np.float32(factor), np.float32(1))
    weights = flatten(model.params)
    down = weights["layers/down"]
    return model.with_params(nest(weights | {"layers/down": down * shares[:, None, None].astype(down.dtype)}))


def run(model: ChatModel, exam: Exam, layers: LayerRange, out: pathlib.Path, seed: int = 0) -> Run:
    """Three strengths and a random range of the same length, each against the model as it is."""
    study = Study(out, model, exam)
    study.examine(Variant("as it is"), model)
    start = int(np.random.default_rng(seed).integers(model.config.layers - len(layers) + 1))
    for factor in (0.0, 0.5, 2.0):
        name, drawn = f"MLP of {layers} times {factor:g}", LayerRange(start, start + len(layers))
        for words, where in (("", layers), ("random: ", drawn)):
            control = None if words else f"random: {name}"
            follows, about = ["scaled MLP", where.first, where.stop, factor], {"factor": factor}
            variant = Variant(words + name, follows, "as it is", control, about=about | {"control": bool(words)})
            study.examine(variant, lambda where=where, factor=factor: scaled(model, where, factor))
    run = record(study, "scaled_mlp", {"layers": str(layers)}, ())
    write_run(out, run, study)
    return run
