"""SCANS on Vicuna-13B v1.5 (arXiv 2408.11491).

The hub holds these weights pickled, which jaxsafe does not read. Convert them once (needs torch and 26 GB of memory):

python -c "import transformers as t; n = 'lmsys/vicuna-13b-v1.5'; t.AutoModelForCausalLM.from_pretrained(n)\
.save_pretrained('vicuna-13b'); t.AutoTokenizer.from_pretrained(n).save_pretrained('vicuna-13b')"

Then

python -m launch.scans --config=configs/scans/vicuna_13b.py --config.model=vicuna-13b \
--config.data=DATA_FOLDER --out=runs/vicuna_13b

calibrates threshold, layers and strength on prompts that no evaluation uses; vicuna_13b.py:published in its place
takes the published choices. DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and
TruthfulQA. Template and system sentence are those of vicuna_7b.py, whose notes hold here too.

Hardware, in bfloat16: 26.0 GB of weights (13.02e9 x 2 bytes) and 800 KiB of keys and values a token
(2 x 40 layers x 40 heads x 128 x 2 bytes), that is 8.4 GB for 32 rows of 320 slots, held twice while answers are
decoded: 43 GB. One 80 GB GPU, or four 16 GB chips with --mesh=data:-1,model:4.

Refusals in percent, default -> SCANS (paper, table 2; its XSTest pair is also that of Llama-2-7B, perhaps by a slip):

    XSTest safe     16.80 ->  9.20        TruthfulQA          4.38 ->  0.27
    XSTest unsafe   98.00 -> 93.50        AdvBench           99.78 -> 99.78
    OKTest          19.33 ->  3.33        MaliciousInstruct  93.00 -> 98.00

The published thresholds were tuned on the test sets, one a set, and so were the scored layers: 0.70 with [10, 20) on
AdvBench and TruthfulQA (the variant's values), 0.60 with [23, 33) on XSTest, 0.62 on OKTest, 0.60 on LLM-Safeguard and
Held-out, 0.65 with layers 37 and 38 on RepE. Give them by hand with, for example,
--config.evaluation="('xstest',)" --config.threshold=0.6 --config.scored="(23, 33)". The variant runs
in float32, where the published answers were made in float16: twice the memory. The state of a layer is here the
residual stream before the final norm, also for the last one, which none of the published ranges holds.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import base
from jaxsafe.configs.scans.llama2_7b_chat import PUBLISHED
from jaxsafe.configs.scans.vicuna_7b import CHAT_TEMPLATE

CHOICES: dict[str, Any] = {
    "alpha": 4.0,
    "reading": "scans_vicuna",
    "scored": (10, 20),
    "threshold": 0.70,
    "expected": ("arXiv 2408.11491, table 2, Vicuna-13B",),
}
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "published": PUBLISHED | CHOICES}


def get_config(variant: str = "") -> ConfigDict:
    """The settings of `variant`, "" (calibrated) or "published". Raises ValueError for another."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known; the variants are {list(VARIANTS)}")
    config = base()
    config.model = "lmsys/vicuna-13b-v1.5"
    config.dtype = "bfloat16"  # stored in float16
    config.chat_template = CHAT_TEMPLATE
    config.update(VARIANTS[variant])
    return config
