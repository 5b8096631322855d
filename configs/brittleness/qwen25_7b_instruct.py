"""Brittleness of Qwen2.5-7B-Instruct; no numbers are published for it.

python -m launch.brittleness --config=configs/brittleness/qwen25_7b_instruct.py --config.data=DATA_FOLDER \
--out=runs/qwen25_7b_instruct_brittleness

Ranks r are counted out of 3584, the model's width; the keys' and values' maps, which have 512, keep the same share of
theirs. DATA_FOLDER holds the published AdvBench file. Without a system prompt its template writes one of its own.

Hardware, in bfloat16: 15.2 GB of weights and two trees of SNIP scores; python -m launch.plan says what fits.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.base import of_model


def get_config() -> ConfigDict:
    """The grids of Llama-2-7B, ranks as shares of this model's width."""
    return of_model("Qwen/Qwen2.5-7B-Instruct", ((3488, 3017), (3578, 3454), (3578, 3568)))
