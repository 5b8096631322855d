"""Launch scripts, one a task: `python -m launch.NAME --help`."""

import os
import sys

from .interruption import end_at_once

if sys.argv[0] == "-m":  # Python imports the package of the script that it is about to start
    end_at_once()

# Only the tokenizers of transformers are used here; it would advise to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
