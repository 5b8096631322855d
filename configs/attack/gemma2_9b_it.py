"""Fine-tuning attacks on Gemma-2-9B-it; no numbers are published for freezing in it.

python -m launch.attack --config=configs/attack/gemma2_9b_it.py --config.data=DATA_FOLDER \
--out=runs/gemma2_9b_it_attack --mesh=data:1,model:8

See llama2_7b_chat.py for files of examples. DATA_FOLDER holds the published AdvBench file. Its template knows no
system prompt and refuses one.

Hardware, in bfloat16 with float32 masters and moments: 18.5 GB of weights and 111 GB of training state; LoRA alone
(--config.tunings="('lora',)") needs little more than the weights.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import of_model


def get_config() -> ConfigDict:
    """The regions of Llama-2-7B."""
    return of_model("google/gemma-2-9b-it")
