"""Brittleness of Llama-2-13B-chat (arXiv 2402.05162).

python -m launch.brittleness --config=configs/brittleness/llama2_13b_chat.py --config.data=DATA_FOLDER \
--mesh=data:1,model:8 --out=runs/llama2_13b_brittleness

llama2_13b_chat.py:published in its place follows the paper's code. See llama2_7b_chat.py for what that is, pairs from
files, suffixes and zero-shot tasks.

Hardware, in bfloat16: 26 GB of weights, two trees of SNIP scores of 50 GB each: two 80 GB GPUs, or sixteen 16 GB chips.

Published orthogonal projection (table 7b); ASR of vanilla / suffix / decoding_mean, zero-shot accuracy:

    r_u, r_s      ASR                accuracy
    3450, 5000    .32 / .98 / .88    .62
    3600, 5000    .41 / .97 / .91    .61
    3750, 5000    .39 / .99 / .89    .62
    3900, 5000    .30 / .99 / .91    .60
    4400, 5000    .91 / 1.00 / .95   .52
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.llama2_7b_chat import get_config as llama2_7b_chat


def get_config(variant: str = "") -> ConfigDict:
    """The paper's grids; `variant` "published" follows its code. Raises ValueError for another."""
    config = llama2_7b_chat(variant)
    config.model = "meta-llama/Llama-2-13b-chat-hf"
    config.orthogonal = ((5000, 3450), (5000, 3600), (5000, 3750), (5000, 3900), (5000, 4400))
    if variant:
        config.expected = ("arXiv 2402.05162, table 7b",)
    return config
