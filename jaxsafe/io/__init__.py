"""How weights come and go: Hugging Face folders, GGUF files, the hub, checkpoints."""
