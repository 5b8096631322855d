"""SCANS on Vicuna-7B v1.5 (arXiv 2408.11491).

The hub holds these weights pickled, which jaxsafe does not read. Convert them once (needs torch and 14 GB of memory):

python -c "import transformers as t; n = 'lmsys/vicuna-7b-v1.5'; t.AutoModelForCausalLM.from_pretrained(n)\
.save_pretrained('vicuna-7b'); t.AutoTokenizer.from_pretrained(n).save_pretrained('vicuna-7b')"

Then

python -m launch.scans --config=configs/scans/vicuna_7b.py --config.model=vicuna-7b \
--config.data=DATA_FOLDER --out=runs/vicuna_7b

calibrates threshold, layers and strength on prompts that no evaluation uses; vicuna_7b.py:published in its place
takes the published choices. DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and
TruthfulQA.

Hardware, in bfloat16: 13.5 GB of weights (6.74e9 x 2 bytes) and 512 KiB of keys and values a token
(2 x 32 layers x 32 heads x 128 x 2 bytes), that is 5.4 GB for 32 rows of 320 slots, held twice while answers are
decoded: 24 GB. One 40 GB GPU, or four 16 GB chips with --mesh=data:-1,model:4.

Refusals in percent, default -> SCANS (paper, table 2):

    XSTest safe     20.80 ->  5.60        TruthfulQA          5.05 ->  0.00
    XSTest unsafe   88.00 -> 87.00        AdvBench           97.37 -> 98.96
    OKTest          19.00 ->  3.00        MaliciousInstruct  76.00 -> 98.00

The tokenizer ships no chat template; CHAT_TEMPLATE is the documented form of v1.1 to v1.5. No system sentence is
given, as in the published answers; the documented one is set with --config.system="A chat between a curious user and an
artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
The published prompts end the user's turn with a line break in place of the space, and those for vectors and classifier
lack the BOS and hold half the system sentence: the scores are not the published ones to the last digit.

The published thresholds were tuned on the test sets, one a set: 0.75, but 0.65 on OKTest, 0.68 on LLM-Safeguard and
Held-out, and on XSTest another rule (safe where the cosine of any layer is below 0.6). Give one by hand with, for
example, --config.evaluation="('oktest',)" --config.threshold=0.65. The variant runs in float32, as published: twice
the memory. The published state of the last layer was taken after the final norm; here it is the residual stream before
that norm.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import base
from jaxsafe.configs.scans.llama2_7b_chat import PUBLISHED

CHAT_TEMPLATE = """\
{{ bos_token }}\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content | trim }} \
{% elif message.role == 'user' %}USER: {{ message.content | trim }} \
{% else %}ASSISTANT: {{ message.content | trim }}{{ eos_token }}\
{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
CHOICES: dict[str, Any] = {
    "alpha": 4.0,
    "reading": "scans_vicuna",
    "expected": ("arXiv 2408.11491, table 2, Vicuna-7B",),
}
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "published": PUBLISHED | CHOICES}


def get_config(variant: str = "") -> ConfigDict:
    """The settings of `variant`, "" (calibrated) or "published". Raises ValueError for another."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known; the variants are {list(VARIANTS)}")
    config = base()
    config.model = "lmsys/vicuna-7b-v1.5"
    config.dtype = "bfloat16"  # stored in float16
    config.chat_template = CHAT_TEMPLATE
    config.update(VARIANTS[variant])
    return config
