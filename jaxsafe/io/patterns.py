"""Regular expressions of strangers: matched in a process whose time and memory the system bounds.

Some take longer than anybody waits, and neither the length of one nor its form says which. This file is the program of
that process as well, which imports nothing of the package.
"""

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS = 1
"""Of the processor, for all patterns of a file; those of real adapters need a thousandth."""
MEMORY = 2**30


def matched(patterns: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, dict[str, str | None]]]:
    """{pattern: {text: named groups}} of the `texts` that each pattern matches as a whole.

    Raises ValueError for what is no pattern, and for patterns that ask for more time or memory than any needs.
    """
    if not patterns:
        return {}
    request = json.dumps([list(patterns), list(texts)])
    done = subprocess.run([sys.executable, "-I", "-S", __file__], input=request, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"its patterns take more than {SECONDS} second or {MEMORY >> 20} MiB to match")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["matches"]


def main() -> None:
    """Answers the request on standard input; the system ends it where that takes too long."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    patterns, texts = json.load(sys.stdin)
    try:
        found = {p: {t: m.groupdict() for t in texts if (m := re.fullmatch(p, t))} for p in patterns}
        answer: dict[str, Any] = {"matches": found}
    except (re.error, OverflowError, RecursionError) as error:
        answer = {"error": f"it holds what is no regular expression ({error})"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
