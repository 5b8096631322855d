"""Words to token arrays: chat templates, batches, data sets of prompts."""
