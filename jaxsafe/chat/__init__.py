"""How a model is asked: tokenizer, chat template, answers."""
