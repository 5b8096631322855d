"""Prompts as token rows, through the model's own tokenizer and chat template."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsafe.io.gguf import GgufFile
from jaxsafe.rows import Batch, Row, pad_rows


def template_arg(text: str) -> tuple[str, Any]:
    """("enable_thinking", False) of "enable_thinking=false": a name and a value in JSON, or else a text.

    Raises ValueError for what has no name, and for what every template is given already.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name in ("messages", "add_generation_prompt", "tokenize"):
        raise ValueError(f"{text!r} is no argument of a chat template; write one as 'enable_thinking=false'")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def template_args(texts: Iterable[str]) -> dict[str, Any]:
    """The arguments of a chat template, each written as `template_arg` reads it."""
    return dict(map(template_arg, texts))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a Hugging Face folder or of a GGUF file.

    `template` (Jinja) takes the place of the folder's chat template, for models that ship none; `template_args` are
    what the template is called with, such as {"enable_thinking": False}.
    """

    path: str | os.PathLike
    template: str | None = None
    template_args: Mapping[str, Any] | None = None

    @functools.cached_property
    def hf(self) -> Any:
        """The `transformers` tokenizer. Raises FileNotFoundError where there is none, and ValueError for a torn one."""
        if str(self.path).endswith(".gguf"):
            return GgufFile(self.path).tokenizer()
        if not pathlib.Path(self.path).is_dir():
            raise FileNotFoundError(f"no tokenizer at {self.path}: not a folder; give a Hugging Face model folder")
        if not any((pathlib.Path(self.path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise FileNotFoundError(f"no tokenizer.json or tokenizer.model in {self.path}")
        import transformers  # heavy, and only needed here

        try:
            return transformers.AutoTokenizer.from_pretrained(str(self.path), local_files_only=True)
        except Exception as error:  # of files that hold something else: unrelated exception families
            raise ValueError(f"the tokenizer in {self.path} cannot be read: {error}") from error

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token id that ends an answer, by generation_config.json, config.json and the tokenizer."""
        ends = {self.hf.eos_token_id}
        for name in ("generation_config.json", "config.json"):
            file = pathlib.Path(self.path) / name
            if file.is_file():
                try:
                    ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
                except ValueError as error:
                    raise ValueError(f"{file} is not JSON: {error}") from None
                ends |= set(ids) if isinstance(ids, list) else {ids}
        return tuple(sorted(ends - {None}))

    @property
    def chat_template(self) -> str:
        """The Jinja source of the chat template. Raises ValueError where the model has none."""
        source = self.template or self.hf.chat_template
        if not source:
            raise ValueError(f"the tokenizer at {self.path} has no chat template; give one, or use raw prompts")
        return source

    @property
    def template_sha256(self) -> str:
        """Digest of the chat template, for the record of a run."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()

    def _messages(self, prompt: str, system: str | None) -> list[dict[str, str]]:
        head = [] if system is None else [{"role": "system", "content": system}]
        return [*head, {"role": "user", "content": prompt}]

    def _rendered(self, prompt: str, system: str | None) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.hf.apply_chat_template(
                self._messages(prompt, system),
                chat_template=self.chat_template,
                add_generation_prompt=True,
                tokenize=False,
                **(self.template_args or {}),
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of {self.path} refuses these messages: {error}") from None

    @functools.cached_property
    def _adds_bos(self) -> bool:
        ids = self.hf("a")["input_ids"]
        return self.hf.bos_token_id is not None and ids[:1] == [self.hf.bos_token_id]

    def chat_row(self, prompt: str, system: str | None = None, response: str = "") -> Row:
        """`prompt` in the chat template up to where the answer begins, then `response` as given.

        The rendered template is tokenised without special tokens, as `apply_chat_template` does it, and begins with
        exactly one BOS where the tokenizer adds one. Raises ValueError for a blank prompt, a missing template, and a
        template that does not hold the prompt's own words, since nothing else shows where the instruction ends.
        """
        if not prompt.strip():
            raise ValueError("a prompt is empty; give it at least one word")
        rendered = self._rendered(prompt, system)
        if prompt.strip() not in rendered:
            raise ValueError(f"the chat template of {self.path} does not hold the prompt {prompt[:40]!r} as it is")
        ids = self._begun(rendered)
        return Row(tuple(ids + self.plain_ids(response)), len(ids) - 1)

    def raw_row(self, prompt: str, response: str = "") -> Row:
        """`prompt` without any template, exactly one BOS in front where the tokenizer adds one."""
        if not prompt.strip():
            raise ValueError("a prompt is empty; give it at least one word")
        ids = self._begun(prompt)
        return Row(tuple(ids + self.plain_ids(response)), len(ids) - 1)

    def _begun(self, text: str) -> list[int]:
        """The ids of a text that a row begins with, one BOS in front where the tokenizer adds one."""
        ids, bos = self.plain_ids(text), self.hf.bos_token_id
        if not self._adds_bos:
            return ids
        return [bos, *itertools.dropwhile(lambda token: token == bos, ids)]

    def plain_ids(self, text: str) -> list[int]:
        """The ids of `text` with no special token added."""
        return list(self.hf(text, add_special_tokens=False)["input_ids"]) if text else []

    def rows(
        self, prompts: Sequence[str], system: str | None = None, responses: Sequence[str] | None = None
    ) -> list[Row]:
        """`chat_row` of each prompt."""
        answers = responses if responses is not None else [""] * len(prompts)
        return [self.chat_row(p, system, r) for p, r in zip(prompts, answers, strict=True)]

    def chat(self, prompts: Sequence[str], system: str | None = None, length: int | None = None) -> Batch:
        """A `Batch` of prompts in the chat template, left-padded to `length` slots (default: a bucket)."""
        return pad_rows(self.rows(prompts, system), length=length)

    def decode(self, tokens: Any, lengths: Any) -> list[str]:
        """The text of each row of `tokens` int [B, T] up to its length, special tokens left out."""
        rows = [np.asarray(t)[:n].tolist() for t, n in zip(tokens, lengths, strict=True)]
        return self.hf.batch_decode(rows, skip_special_tokens=True)
