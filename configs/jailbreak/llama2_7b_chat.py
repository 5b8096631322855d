"""Attacks that leave the weights alone on Llama-2-7B-chat.

python -m launch.jailbreak --config=configs/jailbreak/llama2_7b_chat.py --config.data=DATA_FOLDER \
--out=runs/llama2_7b_jailbreak

with suffixes of your own: --config.attacks="('suffix',)" --config.suffixes=FILE. DATA_FOLDER holds the published
AdvBench file. The weights are gated: accept their licence on the hub and log in first.

Decodings are the 49 that the code published with arXiv 2310.06987 judges: temperatures and top-p from 0.05 to 1 in
steps of 0.05, and nine top-k; one answer is drawn by each, and beside them 49 at temperature 1. Scaled are the layers
that arXiv 2408.17003 finds on this model (6 to 14, table 1), whose weights that paper takes times 1.15 there, and
refusals of look-alikes go from 169 to 297 of 721; below 1 it has numbers of Phi-3-mini alone (0.8: 270 to 149).

Hardware, in bfloat16: 13.5 GB of weights (6.74e9 x 2 bytes), twice where layers are scaled, and 512 KiB of keys and
values a token (2 x 32 layers x 32 heads x 128 x 2 bytes), that is 5.4 GB for 32 rows of 320 slots: one 40 GB GPU, or
four 16 GB chips with --mesh=data:-1,model:4. The grid asks for 98 x 150 answers of up to 256 tokens.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.jailbreak.base import base

STEPS = tuple(round(0.05 * step, 2) for step in range(1, 21))


def get_config() -> ConfigDict:
    """The published grid of decodings and range of layers."""
    config = base()
    config.model = "meta-llama/Llama-2-7b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.temperatures, config.top_ps, config.top_ks = STEPS, STEPS, (1, 2, 5, 10, 20, 50, 100, 200, 500)
    config.scaled_layers = (6, 15)
    config.scales = (0.95, 0.9, 0.85, 0.8)
    return config
