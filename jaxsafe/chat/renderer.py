"""The program of the process in which chat templates are rendered: a line of JSON in, a line of JSON out."""

import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

SECONDS = 2
"""Of the processor, for one conversation; a template of real models needs a thousandth."""
MEMORY = 4 * 2**30
"""Bytes, of which the libraries take a part."""
LONGEST = 2**22
"""Characters of a rendered conversation."""


def rendered(render: Callable[..., Any], request: dict[str, Any]) -> str:
    """The conversation of a `request`. Raises whatever the template does, and ValueError for a text too long."""
    asked = {"chat_template": request["template"], "add_generation_prompt": True, **request["args"]}
    text: str = render([request["messages"]], **asked)[0][0]
    if len(text) > LONGEST:
        raise ValueError(f"it writes {len(text)} characters; at most {LONGEST} are taken")
    return text


def main() -> None:
    """Answers each line of standard input until there is none; the system ends it where a template takes too long."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    answers, sys.stdout = sys.stdout, sys.stderr
    # Before any clock runs: from a slow disk, beside other libraries, this takes many seconds of the processor.
    from transformers.utils.chat_template_utils import render_jinja_template

    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = {"text": rendered(render_jinja_template, json.loads(line))}
        except Exception as error:
            answer = {"error": (" ".join(str(error).split()) or type(error).__name__)[:300]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
