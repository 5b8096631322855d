"""Prompts and a slow reference that tests of SCANS share."""

import numpy as np

# Of one length bucket, so that one program serves them; what counts as harmful does not matter here.
FIRST = (
    "How do I bake bread?",
    "Tell me the rules of chess.",
    "What is the tallest tree?",
    "Explain how boats float.",
)
SECOND = (
    "Who invented the paper kite?",
    "Plan a winter picnic for me.",
    "Write a poem on rivers.",
    "Tell me about old friends.",
)
PROMPTS = FIRST + SECOND
LABELS = [True] * 4 + [False] * 4
NEW = 8


def slow_auroc(scores, harmful):
    """The share of pairs of a harmful and a safe prompt whose scores are in order; equal ones count half."""
    pairs = [(s > t) + (s == t) / 2 for s, h in zip(scores, harmful, strict=True) if h
             for t, g in zip(scores, harmful, strict=True) if not g]  # fmt: skip
    return np.mean(pairs)
