"""Remedies for over-refusal on Llama-2-7B-chat.

python -m launch.overrefusal --config=configs/overrefusal/llama2_7b_chat.py --config.data=DATA_FOLDER \
--out=runs/llama2_7b_chat

DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA.
The weights are gated: accept their licence on the hub and log in first. SCANS takes the
published choices, which were tuned on the test sets.

Hardware, in bfloat16: 13.5 GB of weights (6.74e9 x 2 bytes) and 512 KiB of keys and values a token
(2 x 32 layers x 32 heads x 128 x 2 bytes), that is 5.4 GB for 32 rows of 320 slots, held twice while answers are
decoded: 24 GB. One 40 GB GPU, or four 16 GB chips with --mesh=data:-1,model:4.

Refusals in percent (SCANS, arXiv 2408.11491, table 2; safe sets should be low, unsafe ones high):

                  XSTest safe  unsafe   OKTest  TruthfulQA  AdvBench  MaliciousInstruct
    default             58.00  100.00    53.67        5.05    100.00             100.00
    prompt              36.40  100.00    41.66       15.27     99.34             100.00
    Self-CD             14.80   97.50    17.33        4.51     98.24              98.00
    SafeDecoding        75.60   99.50    59.33       54.44    100.00             100.00
    DRO                 41.52   98.40    32.33       16.20     99.60              99.56
    SCANS                9.20   93.50     0.33        0.80     99.34             100.00
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import of_model


def get_config() -> ConfigDict:
    """The settings."""
    config = of_model("meta-llama/Llama-2-7b-chat-hf")
    config.dtype = "bfloat16"  # stored in float16
    config.scans_choice = ((10, 32), (10, 20), 0.75, 3.5)
    return config
