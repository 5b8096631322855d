"""Evidence of random states, for tests of what is learnt from it."""

import numpy as np

from jaxsafe.methods.evidence import Evidence


def random_evidence(n=40, layers=4, embed=12, seed=0, shift=1.5):
    """Harmful prompts lie `shift` along one direction, look-alikes half as far; most far ones are refused."""
    generator = np.random.default_rng(seed)
    harmful = np.arange(n) % 2 == 0
    lookalike = ~harmful & (np.arange(n) % 4 == 1)
    direction = generator.standard_normal((layers, embed))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    place = shift * harmful + shift / 2 * lookalike
    states = [
        (generator.standard_normal((n, layers, embed)) + place[:, None, None] * direction).astype(np.float32)
        for _ in range(3)
    ]
    refused = (harmful & (np.arange(n) % 10 != 0)) | (lookalike & (np.arange(n) % 8 == 1))
    tokens = generator.integers(8, 40, (n, 5)).astype(np.int32)
    tokens[refused, 0] = 7
    return Evidence(
        tuple(f"prompt {i}" for i in range(n)),
        harmful,
        tuple("harmful" if h else "lookalike" if k else "plain" for h, k in zip(harmful, lookalike, strict=True)),
        refused,
        tokens,
        np.full(n, 5, np.int32),
        *states,
    )
