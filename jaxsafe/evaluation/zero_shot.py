"""Zero-shot accuracy on published tasks, through lm-eval (`pip install "jaxsafe[eval]"`)."""

import dataclasses
import importlib.util
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.stats import Rate, mean_rate, rate
from jaxsafe.progress import Progress, silent

LM_EVAL_03 = "lm_eval_0.3"
ORDERS = ("first", LM_EVAL_03)
"""Of a task's questions, as data have them or as lm-eval 0.3.0 does; see `Shuffled`."""
PUBLISHED = ("boolq", "rte", "hellaswag", "winogrande", "arc_challenge", "openbookqa")
"""The tasks of arXiv 2402.05162, whose mean accuracy (of 200 questions each) is the utility of a model."""
PUBLISHED_ORTHOGONAL = (*PUBLISHED, "arc_easy")
"""Those of its table 7, of 1000 questions each."""


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """The first `limit` questions of each task in the order that lm-eval 0.3.0 put them in, as in arXiv 2402.05162.

    It shuffles the questions by Python's own generator with seed 42 before it takes the first.
    """

    limit: int

    def indices(self, task: Any) -> list[int]:
        """The numbers of these questions of an lm-eval task."""
        order = list(range(len(task.eval_docs)))
        random.Random(42).shuffle(order)
        return order[: self.limit]


def load_tasks(names: Sequence[str] = PUBLISHED, include_path: str | os.PathLike | None = None) -> list[Any]:
    """lm-eval's tasks of these `names` with their data; a group stands for its tasks.

    `include_path` is a folder of further task files (YAML). Raises ValueError for a task that is not known and
    where lm-eval is not installed, and FileNotFoundError where a task's data cannot be loaded.
    """
    _need_lm_eval()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"lm-eval knows no task {name!r}; `lm-eval ls tasks` lists them")
        try:
            tasks |= manager.load([name])["tasks"]
        except OSError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FileNotFoundError(
                f"the data of task {name!r} is neither on this machine nor could it be downloaded: {reason}"
            ) from error
    return list(tasks.values())


def zero_shot(
    model: ChatModel,
    tasks: Sequence[Any] = PUBLISHED,
    limit: int | Shuffled | None = 200,
    batch_size: int = 32,
    seed: int = 0,
    chat: bool = False,
    done: Progress = silent,
) -> dict[str, Rate]:
    """Accuracy (`acc`, without examples in the prompt) of `model` on each task, and their unweighted "mean".

    `tasks` are names, or what `load_tasks` returns, so that many models are asked without loading anew. `limit` is
    the number of first questions asked of each task, None for all, `Shuffled` for those of the paper. With `chat` the
    questions go through the chat template. `done` is called with numbers of finished rows. Raises ValueError for a
    task without accuracy or a limit below 1, and as `load_tasks` does. Protocol: arXiv 2402.05162.
    """
    first = limit.limit if isinstance(limit, Shuffled) else limit
    if first is not None and first < 1:
        raise ValueError(f"limit {first} must be at least 1, or None for every question")
    _need_lm_eval()
    from lm_eval.evaluator import evaluate

    from jaxsafe.evaluation.lm_eval import Adapter

    loaded = _loaded(tasks)
    for task in loaded:
        if "acc" not in task.aggregation():
            measures = ", ".join(task.aggregation())
            raise ValueError(f"task {task.config.task!r} has no accuracy; it measures {measures} (see task_perplexity)")
        task.set_config("num_fewshot", 0)
    results = evaluate(
        lm=Adapter(model, batch_size, seed, done),
        task_dict={task.config.task: task for task in loaded},
        limit=None if isinstance(limit, Shuffled) else limit,
        samples={task.config.task: limit.indices(task) for task in loaded} if isinstance(limit, Shuffled) else None,
        bootstrap_iters=0,
        apply_chat_template=chat,
        system_instruction=model.system if chat else None,
    )
    rates = {name: _accuracy(samples) for name, samples in results["samples"].items()}
    return {**rates, "mean": mean_rate(rates)}


def task_perplexity(
    model: ChatModel, tasks: Sequence[Any] = ("wikitext",), limit: int | None = None, batch_size: int = 32
) -> dict[str, dict[str, float]]:
    """Perplexities of `model` on lm-eval's tasks of whole texts, by task and by the names that lm-eval has for them.

    Of "wikitext" they are word_perplexity, byte_perplexity and bits_per_byte of the detokenized WikiText-2 test
    set, a document at a time in windows of the model's context. Raises ValueError for a task of another kind, and as
    `load_tasks` does.
    """
    _need_lm_eval()
    from lm_eval.evaluator import evaluate

    from jaxsafe.evaluation.lm_eval import Adapter

    loaded = _loaded(tasks)
    for task in loaded:
        if task.OUTPUT_TYPE != "loglikelihood_rolling":
            raise ValueError(
                f"task {task.config.task!r} has no perplexity; it measures {', '.join(task.aggregation())}"
            )
    by_name = {task.config.task: task for task in loaded}
    found = evaluate(lm=Adapter(model, batch_size), task_dict=by_name, limit=limit, bootstrap_iters=0)["results"]
    return {
        name: {measure: float(found[name][f"{measure},none"]) for measure in task.aggregation()}
        for name, task in by_name.items()
    }


def _loaded(tasks: Sequence[Any]) -> list[Any]:
    """`tasks`, those loaded that are names."""
    names = [task for task in tasks if isinstance(task, str)]
    return [*(load_tasks(names) if names else []), *(task for task in tasks if not isinstance(task, str))]


def _accuracy(samples: Sequence[Mapping[str, Any]]) -> Rate:
    first = samples[0]["filter"]
    return rate({0: False, 1: True}.get(s["acc"], s["acc"]) for s in samples if s["filter"] == first)


def _need_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('zero-shot tasks need lm-eval, which is not installed; pip install "jaxsafe[eval]"')
