"""Brittleness of Gemma-3-4B-it; no numbers are published for it.

python -m launch.brittleness --config=configs/brittleness/gemma3_4b_it.py --config.data=DATA_FOLDER \
--out=runs/gemma3_4b_it_brittleness

Ranks r are counted out of 2560, the model's width; the keys' and values' maps, which have 1024, keep the same share
of theirs. DATA_FOLDER holds the published AdvBench file. The text model alone is read, and written where a model is
exported.

Hardware, in bfloat16: 7.8 GB of weights and two trees of SNIP scores; python -m launch.plan says what fits.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.base import of_model


def get_config() -> ConfigDict:
    """The grids of Llama-2-7B, ranks as shares of this model's width."""
    return of_model("google/gemma-3-4b-it", ((2464, 2155), (2554, 2467), (2554, 2544)))
