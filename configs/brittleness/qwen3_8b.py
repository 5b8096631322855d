"""Brittleness of Qwen3-8B; no numbers are published for it.

python -m launch.brittleness --config=configs/brittleness/qwen3_8b.py --config.data=DATA_FOLDER \
--out=runs/qwen3_8b_brittleness

Ranks r are counted out of 4096, the model's width; the keys' and values' maps, which have 1024, keep the same share
of theirs. DATA_FOLDER holds the published AdvBench file. Its template closes an empty block of thoughts before each
answer (template_args); answers are judged behind it.

Hardware, in bfloat16: 16.4 GB of weights and two trees of SNIP scores; python -m launch.plan says what fits.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.base import of_model


def get_config() -> ConfigDict:
    """The grids of Llama-2-7B, ranks as shares of this model's width."""
    config = of_model("Qwen/Qwen3-8B", ((4000, 3448), (4090, 3948), (4090, 4080)))
    config.template_args = ("enable_thinking=false",)
    return config
