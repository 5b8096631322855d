"""How soon a process answers: what importing costs, and the first token with and without compiled programs kept.

    python -m benchmarks.startup

Starts fresh processes, each timed from its start to the end of its last line: one that imports jax, one that imports
jaxsafe as well, and two that load a model and answer a prompt, the second of which finds the programs of the first in
the compilation cache. Prints Markdown.
"""

import os
import subprocess
import sys
import tempfile
import time

from absl import app, flags

ANSWER = """
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
import jaxsafe as js

path = js.resolve("{model}")
config, params = js.load_hf(path)
tokenizer = js.Tokenizer(path)
batch = tokenizer.chat(["Who invented the paper kite?"])
js.generate(config, params, batch, js.Decoding(1, eos=tokenizer.eos_ids)).tokens.block_until_ready()
"""


def seconds(code: str, cache: str) -> float:
    """How long after the start of a new process it has run `code`, with compiled programs in the folder `cache`."""
    command = [sys.executable, "-c", f"{code}\nimport time\nprint(time.time())"]
    start = time.time()
    done = subprocess.run(
        command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.splitlines()[-1]) - start


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    answer = ANSWER.format(model=MODEL.value)
    with tempfile.TemporaryDirectory() as cache:
        rows = {
            "import jax": min(seconds("import jax", cache) for _ in range(3)),
            "import jaxsafe": min(seconds("import jax, jaxsafe", cache) for _ in range(3)),
            "first token, first run": seconds(answer, cache),
            "first token, second run": seconds(answer, cache),
        }
    print("| from the start of the process | seconds |\n|---|---:|")
    for name, took in rows.items():
        print(f"| {name} | {took:.2f} |")


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "smollm2-135m-instruct", "a folder, a hub name, or smollm2-135m-instruct")
    app.run(main)
