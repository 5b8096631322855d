"""Safely partial-parameter fine-tuning of Llama-2-7B-chat (SPPFT, arXiv 2408.17003): a range of layers is frozen.

python -m launch.attack --config=configs/attack/llama2_7b_chat_sppft.py --config.data=DATA_FOLDER \
--config.rows=FILE --out=runs/llama2_7b_sppft --mesh=data:1,model:8

FILE holds benign instructions. The range is found first: the attention and MLP weights of a range of layers are
multiplied by config.layer_alpha, and the range is kept at which most prompts of an over-refusal set are refused. Beside
it stand a range of the same length elsewhere, and the rewinds of both. Norms, embedding and head are trained.

Hardware: as llama2_7b_chat.py.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import base


def get_config() -> ConfigDict:
    """Benign fine-tuning with a range of layers frozen."""
    config = base()
    config.model = "meta-llama/Llama-2-7b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.attacks = ("benign#100",)
    config.tunings = ("full",)
    config.freeze_weights = ()
    config.freeze_ranks = ()
    config.freeze_layers = ("find",)
    config.checkpoint_every = 10
    return config
