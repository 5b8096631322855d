"""Fine-tuning attacks on Qwen3-8B; no numbers are published for freezing in it.

python -m launch.attack --config=configs/attack/qwen3_8b.py --config.data=DATA_FOLDER \
--out=runs/qwen3_8b_attack --mesh=data:1,model:8

See llama2_7b_chat.py for files of examples. DATA_FOLDER holds the published AdvBench file. Its template closes an
empty block of thoughts before each answer (template_args); answers are judged behind it.

Hardware, in bfloat16 with float32 masters and moments: 16.4 GB of weights and 98 GB of training state; LoRA alone
(--config.tunings="('lora',)") needs little more than the weights.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import of_model


def get_config() -> ConfigDict:
    """The regions of Llama-2-7B."""
    config = of_model("Qwen/Qwen3-8B")
    config.template_args = ("enable_thinking=false",)
    return config
