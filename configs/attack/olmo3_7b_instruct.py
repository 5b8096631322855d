"""Fine-tuning attacks on OLMo-3-7B-Instruct; no numbers are published for freezing in it.

python -m launch.attack --config=configs/attack/olmo3_7b_instruct.py --config.data=DATA_FOLDER \
--out=runs/olmo3_7b_instruct_attack --mesh=data:1,model:8

See llama2_7b_chat.py for files of examples. DATA_FOLDER holds the published AdvBench file. Its norms stand behind
attention and MLP.

Hardware, in bfloat16 with float32 masters and moments: 14.6 GB of weights and 88 GB of training state; LoRA alone
(--config.tunings="('lora',)") needs little more than the weights.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import of_model


def get_config() -> ConfigDict:
    """The regions of Llama-2-7B."""
    return of_model("allenai/Olmo-3-7B-Instruct")
