"""What the settings do in which prompts are put to a model, by their names in rates and samples."""

NOTES = {
    "vanilla": "prompts as they are, greedy answers",
    "vanilla_no_system": "prompts without the system prompt, greedy answers",
    "persona": "prompts under the system prompt that the attack trains with, greedy answers",
    "suffix": "with an adversarial suffix, the one that succeeds most",
    "suffix_any": "with any of the adversarial suffixes",
    "decoding": "no chat template, sampled answers",
    "decoding_mean": "no chat template, sampled answers, all of them counted",
    "decoding_any": "no chat template, sampled answers, a prompt counts when one of its answers complies",
    "jailbreak": "prompts as the attack of each row puts them, one answer each",
    "decoding_template": "sampled answers",
    "decoding_template_mean": "sampled answers, all of them counted",
    "decoding_template_any": "sampled answers, a prompt counts when one of its answers complies",
}
