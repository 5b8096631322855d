"""SCANS from prompts to a steering: directions from anchors, and what is left open chosen on calibration prompts."""

import tempfile
from collections.abc import Sequence

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.stats import roc
from jaxsafe.io.store import Store
from jaxsafe.methods import scans, scans_calibration
from jaxsafe.methods.scans import Directions, Prepared
from jaxsafe.methods.scans_calibration import Calibration, OpenChoice
from jaxsafe.progress import Watch, unwatched
from jaxsafe.prompts.roles import labelled
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.scans import Choice, Preparation, Scores


def prepare_scans(
    model: ChatModel,
    anchors: Sequence[PromptSet],
    calibration: Calibration | None = None,
    choice: Choice | OpenChoice = OpenChoice(),
    store: Store | None = None,
    watch: Watch = unwatched,
    batch_size: int = 32,
) -> Prepared:
    """The steering by a given `choice`, or what an `OpenChoice` leaves open chosen on the prompts of `calibration`.

    Directions are those of the harmful and the benign prompts of `anchors`, read `batch_size` at a time. What is
    finished is kept in `store` (None: nothing is), and `watch` shows how far each stage is. Raises ValueError where
    anchors or calibration prompts have no label or are of one kind only, for an open choice without calibration, and
    as `calibrate` does.
    """
    if store is None:
        with tempfile.TemporaryDirectory() as folder:
            return prepare_scans(model, anchors, calibration, choice, Store(folder), watch, batch_size)
    directions = _directions(model, anchors, store, watch, batch_size)
    if isinstance(choice, Choice):
        return Prepared(scans.steering_of(directions, choice), choice, _record(model, directions))
    if calibration is None:
        raise ValueError("a choice that is left open needs calibration prompts; give some, or a whole Choice")
    return _chosen(model, directions, calibration, choice, store, watch)


def _directions(
    model: ChatModel, anchors: Sequence[PromptSet], store: Store, watch: Watch, batch_size: int
) -> Directions:
    prompts, labels = labelled(anchors)
    harmful, benign = ([p for p, h in zip(prompts, labels, strict=True) if h is side] for side in (True, False))
    if not harmful or not benign:
        raise ValueError(f"anchors need harmful and benign prompts; got {len(harmful)} and {len(benign)}")
    with watch("refusal directions", len(prompts)) as done:
        return scans.directions_once(store, model, harmful, benign, batch_size, done)


def _chosen(
    model: ChatModel, directions: Directions, calibration: Calibration, given: OpenChoice, store: Store, watch: Watch
) -> Prepared:
    prompts, harmful, size = calibration.prompts, calibration.harmful, calibration.batch_size
    if len(set(harmful)) < 2:
        raise ValueError("calibration needs harmful and safe prompts; there is one kind only")
    with watch("classifier on calibration prompts", len(prompts)) as done:
        reading = scans.reading_once(store, model, directions, prompts, size, done)
    record = _record(model, directions)
    pieces = given.pieces(len(prompts), model.config.layers, record.vocabulary)
    with watch("layers and strength", pieces) as done:
        choice, strength, scores = scans_calibration.choose_once(
            store, model, directions, (reading, record.vocabulary), given, calibration, done
        )
    whole = Preparation(
        record.vocabulary,
        record.norm,
        record.residual_norm,
        tuple(scans.separation(reading, harmful)),
        Scores(tuple(map(float, scores)), harmful),
        roc(scores, harmful),
        strength,
    )
    return Prepared(scans.steering_of(directions, choice), choice, whole)


def _record(model: ChatModel, directions: Directions) -> Preparation:
    """What there is to say of directions alone."""
    norm, residual = (tuple(map(float, values)) for values in (directions.norm, directions.residual_norm))
    return Preparation(scans.vocabulary(model, directions), norm, residual)
