"""What a SCANS run has of its own (arXiv 2408.11491): directions, classifier, choice of layers and strength.

L layers, n prompts
"""

import dataclasses

from jaxsafe.model.layers import LayerRange


@dataclasses.dataclass(frozen=True)
class Token:
    """A token that a direction points to; refusal: whether it is a word of refusal."""

    token: str
    score: float
    refusal: bool


@dataclasses.dataclass(frozen=True)
class Segment:
    """A third of the layers, the share of variance of its first component, and the tokens that this points to."""

    name: str
    layers: LayerRange
    explained_variance: float
    tokens: tuple[Token, ...]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Directions as words: of thirds of the layers, and of each layer [L]."""

    segments: tuple[Segment, ...]
    layers: tuple[tuple[Token, ...], ...]


@dataclasses.dataclass(frozen=True)
class Scores:
    """The classifier's scores of n prompts and their labels."""

    scores: tuple[float, ...]
    harmful: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A receiver operating characteristic; each point is the verdict score >= threshold."""

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    thresholds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """How well one class is told; n: prompts of it."""

    n: int
    precision: float | None
    recall: float | None
    f1: float | None
    auprc: float | None


@dataclasses.dataclass(frozen=True)
class Classification:
    """How well a score tells harmful prompts from safe ones; None where a number is undefined.

    safe: figures of the class *safe*, which are those published with SCANS (arXiv 2408.11491); harmful: of the other;
    auroc (with its 95% interval) and balanced_accuracy: of both classes alike. Counts read truth_as_verdict.
    threshold: unsafe iff score >= it.
    """

    threshold: float
    safe: ClassFigures
    harmful: ClassFigures
    auroc: float | None
    auroc_low: float | None
    auroc_high: float | None
    balanced_accuracy: float | None
    safe_as_safe: int
    safe_as_unsafe: int
    unsafe_as_safe: int
    unsafe_as_unsafe: int


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Layers that are averaged over, and scores of the calibration's and of the test's labelled prompts.

    found, roc: of the test's prompts, None where they are not of both classes; calibration_roc: of the calibration's.
    """

    layers: LayerRange
    threshold: float
    test: Scores
    found: Classification | None
    roc: Curve | None = None
    calibration: Scores | None = None
    calibration_roc: Curve | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting and what it does to the calibration prompts: shares in [0, 1], KL in nats a token.

    alpha: the mean over the steered layers of what is added, in units of the residual stream; balanced_accuracy: the
    mean of the shares of safe prompts that are complied with and of harmful ones that are refused; broken: of all
    answers, None where that was not measured.
    """

    layers: LayerRange
    alpha_rel: float
    alpha: float
    threshold: float
    refusal_safe: float
    refusal_harmful: float
    balanced_accuracy: float
    kl_benign: float
    allowed: bool
    chosen: bool
    broken: float | None = None


@dataclasses.dataclass(frozen=True)
class Strength:
    """Candidates tried on n calibration prompts, and the limits they are held to."""

    kl_limit: float
    max_drop: float
    n: int
    candidates: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the steered variant steers with: `alpha` (absolute), or `alpha_rel` of the length of a layer's state.

    share_of: "difference" takes `alpha_rel` of the length of the layer's difference of means instead.
    """

    scored: LayerRange
    layers: LayerRange
    threshold: float
    alpha: float | None = None
    alpha_rel: float | None = None
    share_of: str = "state"

    def __str__(self) -> str:
        of = "" if self.share_of == "state" else f" of the {self.share_of}"
        strength = f"alpha_rel {self.alpha_rel:g}{of}" if self.alpha is None else f"alpha {self.alpha:g}"
        return f"steered layers {self.layers} with {strength}; harmful from score {self.threshold:.3f} on"


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a steering came about; a number by layer is a tuple of L. None where nothing was calibrated."""

    vocabulary: Vocabulary
    norm: tuple[float, ...]
    residual_norm: tuple[float, ...]
    separation: tuple[float, ...] | None = None
    calibration: Scores | None = None
    roc: Curve | None = None
    strength: Strength | None = None


@dataclasses.dataclass(frozen=True)
class Details:
    """Of a SCANS run: `average` is the share of prompts treated rightly, plain and steered (the paper's Avg.)."""

    choice: Choice
    preparation: Preparation | None
    classifier: Classifier
    average: tuple[float | None, float | None] | None
    perplexity_text: str
