"""The safety landscape of Llama-2-7B-chat (arXiv 2405.17374).

python -m launch.landscape --config=configs/landscape/llama2_7b_chat.py --config.data=DATA_FOLDER \
--out=runs/llama2_7b_landscape

DATA_FOLDER holds the published AdvBench file, of which the first 80 prompts are asked under Llama-2's system prompt;
greedy answers of 512 tokens, three random lines of 21 points from -0.5 to 0.5, each tensor's direction as long as its
weights, embeddings included and norms left alone, all as published. With --config.plane_steps=20 it draws the
landscape over two directions (441 points), with --config.other_model=FOLDER the line to a fine-tuned model.

What is otherwise: weights are bfloat16 (theirs float32), so steps far below a hundredth of the norm are rounded;
refusals are told by the 31 phrases of the judge wei2024_no_length (theirs are 29); the directions are other draws.
Capability is perplexity of the built-in prose, or of --config.text=FILE (theirs: MMLU).

Hardware, in bfloat16: 13.5 GB of weights, the same of directions and of moved weights; the line to another model holds
its difference in float32 (27 GB): one 80 GB GPU, or eight 16 GB chips with --mesh=data:1,model:8.

Published VISAGE: Llama-2-7B-chat 85.32, Llama-3-8B-Instruct 90.40, Mistral-7B-Instruct 82.04, Vicuna-7B 73.26.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.llama2_7b_chat import SYSTEM
from jaxsafe.configs.landscape.base import base


def get_config() -> ConfigDict:
    """The paper's lines and prompts."""
    config = base()
    config.model = "meta-llama/Llama-2-7b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.system = SYSTEM
    config.max_new_tokens = 512
    return config
