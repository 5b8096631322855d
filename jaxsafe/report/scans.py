"""What the report of a SCANS run has of its own (arXiv 2408.11491): classifier, directions, words, strength."""

from jaxsafe.records.run import Run, from_json
from jaxsafe.records.scans import Classifier, Details, Preparation
from jaxsafe.report import plots_scans as plots
from jaxsafe.report.own import Own
from jaxsafe.report.page import percent
from jaxsafe.report.sections import headlined
from jaxsafe.report.style import Drawing


def own(run: Run) -> Own:
    """The sections of a SCANS run. Raises ValueError where its details are none."""
    details = from_json(run.details, Details)
    prepared, facts = details.preparation, [("Steering", str(details.choice))]
    if details.average is not None:
        facts.append(("Treated rightly", " → ".join(map(percent, details.average))))
    contents = {"classifier": "Classifier"}
    if prepared:
        contents |= {"directions": "Directions", "vocabulary": "Vocabulary"}
        contents |= {"strength": "Strength"} if prepared.strength else {}
    return Own(
        title="Over-refusal of",
        kicker="Safety-conscious activation steering (SCANS)",
        best=headlined(run),
        template="scans.html.j2",
        contents=contents,
        figures=_figures(details),
        values={
            "details": details,
            "calibration_scores": details.classifier.calibration or (prepared and prepared.calibration),
            "flagged": flagged(details.classifier),
            "by_layers": plots.by_layers,
        },
        facts=[*facts, ("Perplexity of", details.perplexity_text)],
    )


def flagged(classifier: Classifier) -> dict[bool, tuple[int, int]]:
    """(taken as harmful, all) among the harmful (True) and the safe (False) test prompts."""
    pairs = [
        (score >= classifier.threshold, harmful)
        for score, harmful in zip(classifier.test.scores, classifier.test.harmful, strict=True)
    ]
    return {
        label: (sum(flag for flag, harmful in pairs if harmful == label), sum(h == label for _, h in pairs))
        for label in (True, False)
    }


def _figures(details: Details) -> list[Drawing]:
    """Every figure that the run has data for."""
    classifier, prepared = details.classifier, details.preparation
    calibration = classifier.calibration or (prepared and prepared.calibration)
    figures = []
    if calibration and calibration.scores:
        figures.append(plots.score_histogram("scores-calibration", calibration, classifier.threshold))
    if classifier.test.scores:
        figures.append(plots.score_histogram("scores-test", classifier.test, classifier.threshold))
    if classifier.roc and classifier.roc.fpr:
        calibrated = classifier.calibration_roc or (prepared and prepared.roc) or None
        figures.append(plots.roc("roc", classifier.roc, classifier.threshold, calibrated))
    return figures + (_preparation_figures(details, prepared) if prepared else [])


def _preparation_figures(details: Details, prepared: Preparation) -> list[Drawing]:
    steered, strength = details.choice.layers, prepared.strength
    figures = [plots.layer_norms("norms", prepared.norm, prepared.residual_norm, steered)]
    if prepared.separation:
        figures.append(plots.layer_separation("separation", prepared.separation, steered))
    if strength and strength.candidates and prepared.calibration:
        labels = prepared.calibration.harmful
        counts = sum(not label for label in labels), sum(labels)
        groups = plots.by_layers(strength.candidates).values()
        figures += [plots.strength_refusals(f"strength-{index}", rows, counts) for index, rows in enumerate(groups)]
        figures.append(plots.strength_cost("strength-kl", strength.candidates, strength.kl_limit))
    return figures
