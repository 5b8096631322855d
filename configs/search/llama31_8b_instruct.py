"""The search of TamperBench (arXiv 2602.06911) on Llama-3.1-8B-Instruct, one of the models of its examples.

python -m launch.search --config=configs/search/llama31_8b_instruct.py --config.data=DATA_FOLDER --config.bound=0.1 \
--config.poison=FILE --out=runs/llama31_8b_search

FILE holds the user's harmful examples (none are shipped), DATA_FOLDER the published AdvBench file. The space of rates,
steps, batch sizes, ranks and schedules and the 40 trials are those of the published code, which also tries templates of
its own; here examples are put as the model's template has them. The number of examples is ours, and so is harm, attack
success by the judge (theirs: StrongREJECT). The paper bounds the loss of accuracy in MMLU-Pro by a tenth, which lm-eval
measures by answers that are generated and this library does not; of perplexity no bound is published, so config.bound
has to be given. Or name tasks: --config.utility_tasks="('boolq','rte')".

Hardware, in bfloat16: 16.1 GB of weights, adapters and activations of up to 64 examples a step: one 80 GB GPU. A trial
of 512 such steps takes hours; up to 80 trials are run.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.search.base import base


def get_config() -> ConfigDict:
    """The published space, harmful examples of the user's."""
    config = base()
    config.model = "meta-llama/Llama-3.1-8B-Instruct"
    config.attack = "poisoned#100"
    return config
