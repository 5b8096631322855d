"""Brittleness of Mistral-7B-Instruct v0.2, with grouped-query attention; no numbers are published for it.

python -m launch.brittleness --config=configs/brittleness/mistral_7b_instruct.py --config.data=DATA_FOLDER \
--out=runs/mistral_7b_instruct_brittleness

Ranks r are counted out of 4096, the model's width; the keys' and values' maps, which have 1024, keep the same share of
theirs. DATA_FOLDER holds the published AdvBench file.

Hardware, in bfloat16: 14.5 GB of weights, two trees of SNIP scores of 27.9 GB each: one 80 GB GPU, or eight
16 GB chips with --mesh=data:1,model:8.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.base import of_model


def get_config() -> ConfigDict:
    """The grids of Llama-2-7B."""
    return of_model("mistralai/Mistral-7B-Instruct-v0.2", ((4000, 3450), (4090, 3950), (4090, 4080)))
