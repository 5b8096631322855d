"""Anatomy of the safety of Llama-2-7B-chat, the main model of arXiv 2402.05162 and arXiv 2410.10862.

python -m launch.anatomy --config=configs/anatomy/llama2_7b_chat.py --config.data=DATA_FOLDER \
--out=runs/llama2_7b_anatomy

DATA_FOLDER holds the published AdvBench file. For the scan of layers, which answers the over-refusal prompts once for
each range that it tries: --config.over_refusal="('builtin:lookalike/calibration#60',)" --config.layer_alpha=1.15 (the
published factor).

Hardware, in bfloat16: 13.5 GB of weights; SNIP adds two trees of float32 scores, 26 GB each: one 80 GB GPU, or eight
16 GB chips with --mesh=data:1,model:8. Grams of ActSVD take 8.6 GB.

Published, to hold the run against (judges, prompts and truncation differ): units of safety are 1.3% of all, of utility
13.3%, redundant 14.8%, complex 70.6%; without those of safety the ASR goes from 10 to 66% (arXiv 2410.10862). Safety
layers are 6 to 14, counted from 0 (arXiv 2408.17003).
"""

from ml_collections import ConfigDict

from jaxsafe.configs.anatomy.base import base


def get_config() -> ConfigDict:
    """Published shares of units and numbers of samples; weights and ranks of the published grids."""
    config = base()
    config.model = "meta-llama/Llama-2-7b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.malicious = ("advbench#100",)
    config.normal = ("builtin:plain/calibration",)
    return config
