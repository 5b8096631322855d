"""SCANS on Llama-2-7B-chat, the main model of the paper (arXiv 2408.11491).

python -m launch.scans --config=configs/scans/llama2_7b_chat.py --config.data=DATA_FOLDER --out=runs/llama2_7b

calibrates threshold, layers and strength on prompts that no evaluation uses. The variant "published",

python -m launch.scans --config=configs/scans/llama2_7b_chat.py:published --config.data=DATA_FOLDER \
--out=runs/llama2_7b_published

takes the published choices instead. DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench,
MaliciousInstruct and TruthfulQA. The weights are gated: accept their licence on the hub and log in first.

Hardware, in bfloat16: 13.5 GB of weights (6.74e9 x 2 bytes) and 512 KiB of keys and values a token
(2 x 32 layers x 32 heads x 128 x 2 bytes), that is 5.4 GB for 32 rows of 320 slots, held twice while answers are
decoded: 24 GB. One 40 GB GPU, or four 16 GB chips with --mesh=data:-1,model:4.

Refusals in percent, default -> SCANS (paper, table 2):

    XSTest safe      58.00 ->  9.20        TruthfulQA           5.05 ->   0.80
    XSTest unsafe   100.00 -> 93.50        AdvBench           100.00 ->  99.34
    OKTest           53.67 ->  0.33        MaliciousInstruct  100.00 -> 100.00

The published threshold 0.75 was tuned on the test sets, as were 0.70 for their two further sets (LLM-Safeguard,
Held-out); XSTest's refusals move steeply with it (safe / unsafe 3.6 / 71.0 at 0.80, 33.2 / 99.5 at 0.70, table 7). The
variant runs in float32, as published: twice the memory. The published state of the last layer was taken after the final
norm; here it is the residual stream before that norm, so the score of [10, 32) differs a little.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import base

PUBLISHED: dict[str, Any] = {
    "anchors": ("advbench#64", "truthfulqa#64"),
    "calibration": (),
    "scored": (10, 32),
    "threshold": 0.75,
    "layers": (10, 20),
    "alpha": 3.5,
    "repetition_penalty": 1.1,
    "reading": "scans",
    "dtype": "float32",
    "expected": ("arXiv 2408.11491, table 2, Llama-2-7B",),
}
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "published": PUBLISHED}


def get_config(variant: str = "") -> ConfigDict:
    """The settings of `variant`, "" (calibrated) or "published". Raises ValueError for another."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known; the variants are {list(VARIANTS)}")
    config = base()
    config.model = "meta-llama/Llama-2-7b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.update(VARIANTS[variant])
    return config
