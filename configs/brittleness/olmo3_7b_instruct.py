"""Brittleness of OLMo-3-7B-Instruct; no numbers are published for it.

python -m launch.brittleness --config=configs/brittleness/olmo3_7b_instruct.py --config.data=DATA_FOLDER \
--out=runs/olmo3_7b_instruct_brittleness

Ranks r are counted out of 4096, the model's width. DATA_FOLDER holds the published AdvBench file. Its norms stand
behind attention and MLP.

Hardware, in bfloat16: 14.6 GB of weights and two trees of SNIP scores; python -m launch.plan says what fits.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.base import of_model


def get_config() -> ConfigDict:
    """The grids of Llama-2-7B, ranks as shares of this model's width."""
    return of_model("allenai/Olmo-3-7B-Instruct", ((4000, 3448), (4090, 3948), (4090, 4080)))
