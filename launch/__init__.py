"""Launch scripts, one a task: `python -m launch.NAME --help`."""

import os

# Only the tokenizers of transformers are used here; it would advise to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
