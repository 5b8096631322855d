"""Remedies for over-refusal on Mistral-7B-Instruct v0.2.

python -m launch.overrefusal --config=configs/overrefusal/mistral_7b_instruct.py --config.data=DATA_FOLDER \
--out=runs/mistral_7b_instruct

DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA.
No settings of AdaSteer and AlphaSteer are published for this model; it takes ours, by KL.

Hardware, in bfloat16: 14.5 GB of weights (7.24e9 x 2 bytes) and 128 KiB of keys and values a token
(2 x 32 layers x 8 key/value heads x 128 x 2 bytes), that is 1.3 GB for 32 rows of 320 slots, held twice while answers
are decoded: 17 GB. One 24 GB GPU, or two 16 GB chips with --mesh=data:-1,model:2.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import of_model


def get_config() -> ConfigDict:
    """The settings."""
    return of_model("mistralai/Mistral-7B-Instruct-v0.2")
