"""A chat model in memory as a model of lm-eval, the EleutherAI evaluation harness (needs `lm-eval`)."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.likelihood import likelihood
from jaxsafe.kernels.sampling import Decoding, Sampling
from jaxsafe.parallel import put_rows
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Batch, Row, Tree

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Adapter(TemplateLM):
    """Answers lm-eval's requests with `model`, to the same tokens as lm-eval's own `hf` model.

    Requests run in batches of up to `batch_size` rows of like length; `done` is called with each batch's number of
    rows. `seed` is that of sampled generations. Prompts are as lm-eval writes them, without the chat template unless
    it is asked for one.
    """

    def __init__(self, model: ChatModel, batch_size: int = 32, seed: int = 0, done: Progress = silent) -> None:
        super().__init__()
        self.model = model
        self.batch_size = batch_size
        self.seed = seed
        self.done = done
        self.tokenizer = model.tokenizer.hf

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id in front of a text without context: BOS, or end-of-text where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The most tokens the model is run on."""
        return self.model.config.context

    @property
    def max_gen_toks(self) -> int:
        """The most new tokens of a generation that does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's place, for lm-eval's cache of requests."""
        return str(self.model.tokenizer.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of `string`, with what the tokenizer puts around it unless it begins with the prefix token."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """`chat_history` in the model's chat template; its last message goes on where no answer is to begin."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            chat_template=self.model.tokenizer.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **(self.model.tokenizer.template_args or {}),
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation, and whether it is greedy, for (text, context, continuation).

        What does not fit the model's context is cut from the left. Raises ValueError for a continuation of no
        token, or of more tokens than the context holds.
        """
        if not requests:
            return []
        texts = [self._text(context, continuation) for _, context, continuation in requests]
        rows = [Row(text.ids[:-1], text.instruction_end) for text in texts]
        final = np.array([text.ids[-1] for text in texts], np.int32)
        model = self.model

        def call(batch: Batch, indices: np.ndarray) -> Tree:
            return likelihood(
                model.config, model.params, batch, put_rows(final[indices], model.mesh), edits=model.edits
            )

        total, greedy = model.map(call, rows, self.batch_size, self.done)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _text(self, context: list[int], continuation: list[int]) -> Row:
        n = len(continuation)
        if not 1 <= n <= self.max_length:
            raise ValueError(f"a continuation of {n} tokens; it must have at least 1 and at most {self.max_length}")
        ids = (context or [self.prefix_token_id])[-(self.max_length + 1 - n) :] + continuation
        return Row(tuple(ids), len(ids) - 1 - n)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of each whole text, in windows of the model's context that do not overlap."""
        windows = [self._windows(*request.args) for request in requests]
        flat = [(None, *window) for of_text in windows for window in of_text]
        scores = iter(self._loglikelihood_tokens(flat))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        pieces = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
        return [make_disjoint_window(piece) for piece in pieces]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its `until` strings."""
        groups: dict[tuple[int, Sampling], list[int]] = collections.defaultdict(list)
        for i, request in enumerate(requests):
            groups[generation_settings(request.args[1], self.max_gen_toks)].append(i)
        texts = [""] * len(requests)
        for (new_tokens, sampling), members in groups.items():
            contexts = [requests[i].args[0] for i in members]
            for i, text in zip(members, self._generate(contexts, new_tokens, sampling), strict=True):
                texts[i] = cut(text, self._stops(requests[i].args[1].get("until")))
        return texts

    def _generate(self, contexts: Sequence[str], new_tokens: int, sampling: Sampling) -> list[str]:
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(
                f"{new_tokens} new tokens leave no room for a prompt in the model's context of {self.max_length}; "
                "give a smaller max_gen_toks"
            )
        ids = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        rows = [Row(tuple(row), len(row) - 1) for row in ids]
        decoding = Decoding(new_tokens, sampling, self.seed)
        return list(self.model.answers(rows, decoding, self.batch_size, self.done).texts)

    def _stops(self, until: str | Sequence[str] | None) -> list[str]:
        given = [until] if isinstance(until, str) else list(until or [])
        return [*given, self.tokenizer.decode([self.eot_token_id])]


def generation_settings(kwargs: Mapping[str, Any], usual_length: int) -> tuple[int, Sampling]:
    """New tokens and sampling of a request's `kwargs`, greedy unless `do_sample` or a temperature says otherwise.

    Raises ValueError for an option that is not supported.
    """
    given = {name: value for name, value in kwargs.items() if value is not None and name != "until"}
    lengths = [given.pop(name) for name in LENGTH_NAMES if name in given]
    sampled = given.pop("do_sample", given.get("temperature", 0) > 0)
    temperature = given.pop("temperature", 1.0)
    if unknown := given.keys() - {"top_k", "top_p", "repetition_penalty"}:
        raise ValueError(
            f"generation option {min(unknown)!r} is not supported; use until, max_gen_toks, do_sample, temperature, "
            "top_k, top_p and repetition_penalty"
        )
    return int(lengths[0] if lengths else usual_length), Sampling(temperature if sampled else 0.0, **given)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to where the first of `stops` begins."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text
