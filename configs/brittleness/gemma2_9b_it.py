"""Brittleness of Gemma-2-9B-it; no numbers are published for it.

python -m launch.brittleness --config=configs/brittleness/gemma2_9b_it.py --config.data=DATA_FOLDER \
--out=runs/gemma2_9b_it_brittleness

Ranks r are counted out of 3584, the model's width; the keys' and values' maps, which have 2048, keep the same share
of theirs. DATA_FOLDER holds the published AdvBench file. Its template knows no system prompt and refuses one.

Hardware, in bfloat16: 18.5 GB of weights and two trees of SNIP scores; python -m launch.plan says what fits.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.base import of_model


def get_config() -> ConfigDict:
    """The grids of Llama-2-7B, ranks as shares of this model's width."""
    return of_model("google/gemma-2-9b-it", ((3488, 3017), (3578, 3454), (3578, 3568)))
