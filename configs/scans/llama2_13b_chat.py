"""SCANS on Llama-2-13B-chat (arXiv 2408.11491).

python -m launch.scans --config=configs/scans/llama2_13b_chat.py --config.data=DATA_FOLDER --out=runs/llama2_13b

calibrates threshold, layers and strength on prompts that no evaluation uses. The variant "published",

python -m launch.scans --config=configs/scans/llama2_13b_chat.py:published --config.data=DATA_FOLDER \
--out=runs/llama2_13b_published

takes the published choices instead. DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench,
MaliciousInstruct and TruthfulQA. The weights are gated: accept their licence on the hub and log in first.

Hardware, in bfloat16: 26.0 GB of weights (13.02e9 x 2 bytes) and 800 KiB of keys and values a token
(2 x 40 layers x 40 heads x 128 x 2 bytes), that is 8.4 GB for 32 rows of 320 slots, held twice while answers are
decoded: 43 GB. One 80 GB GPU, or four 16 GB chips with --mesh=data:-1,model:4.

Refusals in percent, default -> SCANS (paper, table 2):

    XSTest safe      34.40 ->  7.20        TruthfulQA          11.69 ->   1.20
    XSTest unsafe    99.50 -> 97.50        AdvBench            99.78 ->  98.90
    OKTest           20.33 ->  0.33        MaliciousInstruct  100.00 ->  97.00

The published threshold 0.75 was tuned on the test sets, as were 0.65 (LLM-Safeguard) and 0.68 (Held-out) for their two
further sets. The published cosines were taken in float32 and the answers made in float16; the variant does
both in float32, with twice the memory (--config.dtype=bfloat16 where that is too much). The state of a layer is here
the residual stream before the final norm, also for the last one, which the published range [10, 19) leaves out.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import base
from jaxsafe.configs.scans.llama2_7b_chat import PUBLISHED

CHOICES: dict[str, Any] = {"scored": (10, 19), "expected": ("arXiv 2408.11491, table 2, Llama-2-13B",)}
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "published": PUBLISHED | CHOICES}


def get_config(variant: str = "") -> ConfigDict:
    """The settings of `variant`, "" (calibrated) or "published". Raises ValueError for another."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known; the variants are {list(VARIANTS)}")
    config = base()
    config.model = "meta-llama/Llama-2-13b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.update(VARIANTS[variant])
    return config
