"""Remedies for over-refusal on Llama-3.1-8B-Instruct.

python -m launch.overrefusal --config=configs/overrefusal/llama31_8b_instruct.py --config.data=DATA_FOLDER \
--out=runs/llama31_8b_instruct

DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA.
AdaSteer and AlphaSteer take the coefficients, blocks and shares that their authors publish for this model.

Hardware, in bfloat16: 16.1 GB of weights (8.03e9 x 2 bytes) and 128 KiB of keys and values a token
(2 x 32 layers x 8 key/value heads x 128 x 2 bytes), that is 1.3 GB for 32 rows of 320 slots, held twice while answers
are decoded: 19 GB. One 24 GB GPU, or two 16 GB chips with --mesh=data:-1,model:2.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import of_model


def get_config() -> ConfigDict:
    """The settings."""
    return of_model("meta-llama/Llama-3.1-8B-Instruct", "llama3.1-8b")
