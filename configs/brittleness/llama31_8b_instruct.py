"""Brittleness of Llama-3.1-8B-Instruct, with grouped-query attention; no numbers are published for it.

python -m launch.brittleness --config=configs/brittleness/llama31_8b_instruct.py --config.data=DATA_FOLDER \
--out=runs/llama31_8b_instruct_brittleness

Ranks r are counted out of 4096, the model's width; the keys' and values' maps, which have 1024, keep the same share of
theirs. DATA_FOLDER holds the published AdvBench file.

Hardware, in bfloat16: 16.1 GB of weights, two trees of SNIP scores of 27.9 GB each: one 80 GB GPU, or eight
16 GB chips with --mesh=data:1,model:8.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.base import of_model


def get_config() -> ConfigDict:
    """The grids of Llama-2-7B."""
    return of_model("meta-llama/Llama-3.1-8B-Instruct", ((4000, 3450), (4090, 3950), (4090, 4080)))
