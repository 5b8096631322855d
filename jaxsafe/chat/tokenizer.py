"""Prompts as token rows, through the model's own tokenizer and chat template."""

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsafe.chat.template import shared_renderer
from jaxsafe.io.gguf import GgufFile
from jaxsafe.reading import read_json, reading
from jaxsafe.rows import Batch, Row, pad_rows

SENTENCEPIECE = "pip install sentencepiece, or put a tokenizer.json beside it"


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
        shared_renderer().start()  # while this process opens the tokenizer and reads the weights
        folder = pathlib.Path(self.path)
        if self.gguf is not None:
            return self.gguf.tokenizer()
        if not folder.is_dir():
            raise FileNotFoundError(f"no tokenizer at {folder}: not a folder; give a Hugging Face model folder")
        if not (folder / "tokenizer.json").is_file():
            if not (folder / "tokenizer.model").is_file():
                raise FileNotFoundError(f"no tokenizer.json or tokenizer.model in {folder}")
            if importlib.util.find_spec("sentencepiece") is None:
                raise ValueError(f"{folder / 'tokenizer.model'} is read by a package of its own: {SENTENCEPIECE}")
        import transformers  # heavy, and only needed here

        with reading(folder, "holds a tokenizer that cannot be read"):
            try:
                return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            except Exception:
                for file in sorted(folder.glob("*.json")):
                    read_json(file)  # names the file where it is one that is torn
                raise

    @functools.cached_property
    def gguf(self) -> GgufFile | None:
        """The GGUF file; None of a folder. Raises as `GgufFile` does."""
        return GgufFile(self.path) if pathlib.Path(self.path).is_file() else None

    def with_template(self, template: str) -> "Tokenizer":
        """This tokenizer, opened once, with another chat template."""
        other = dataclasses.replace(self, template=template)
        vars(other).update(hf=self.hf, gguf=self.gguf)
        return other

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token id that ends an answer: by the tokenizer, generation_config.json and config.json, or a GGUF file.

        Raises ValueError for ids that are none.
        """
        ends = {self.hf.eos_token_id, *(self.gguf.ends if self.gguf else ())}
        for name in ("generation_config.json", "config.json"):
            file = pathlib.Path(self.path) / name
            ids = read_json(file).get("eos_token_id") if file.is_file() else None
            listed = ids if isinstance(ids, list) else [ids]
            if not all(each is None or (isinstance(each, int) and not isinstance(each, bool)) for each in listed):
                raise ValueError(f"{file} has eos_token_id {ids!r:.60}; an id or a list of ids is expected")
            ends.update(listed)
        return tuple(sorted(number for number in ends if number is not None and number >= 0))

    def check_vocabulary(self, ids: Iterable[int], vocab: int) -> None:
        """Raises ValueError, naming the token, where one of `ids` lies beyond a vocabulary of `vocab` tokens."""
        if (largest := max(ids, default=0)) < vocab:
            return
        with reading(self.path):
            token = self.hf.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{self.path}: the tokenizer gives {token!r} the number {largest}; the model has {vocab} tokens"
        )

    @functools.cached_property
    def _source(self) -> str | None:
        """The Jinja source of the chat template; of several, the one that is called "default"."""
        source = self.template or self.hf.chat_template
        if isinstance(source, dict):
            if "default" not in source:
                raise ValueError(f"{self.path} has chat templates {sorted(source)} and none called 'default'; give one")
            source = source["default"]
        if not isinstance(source, str | None):
            raise ValueError(f"{self.path} has a chat template {source!r:.60}; a text is expected")
        return source or None

    @property
    def chat_template(self) -> str:
        """The Jinja source of the chat template. Raises ValueError where the model has none."""
        if self._source is None:
            raise ValueError(f"the tokenizer at {self.path} has no chat template; give one, or use raw prompts")
        return self._source

    @property
    def template_sha256(self) -> str:
        """Digest of the chat template, for the record of a run."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()

    def _messages(self, prompt: str, system: str | None) -> list[dict[str, str]]:
        head = [] if system is None else [{"role": "system", "content": system}]
        return [*head, {"role": "user", "content": prompt}]

    def _rendered(self, prompt: str, system: str | None) -> str:
        template, messages = self.chat_template, self._messages(prompt, system)
        given = {name: token for name, token in self.hf.special_tokens_map.items() if isinstance(token, str)}
        with reading(self.path, "has a chat template that refuses these messages"):
            return shared_renderer().render(template, messages, given | dict(self.template_args or {}))

    @functools.cached_property
    def _adds_bos(self) -> bool:
        with reading(self.path):
            ids = self.hf("a")["input_ids"]
        return self.hf.bos_token_id is not None and ids[:1] == [self.hf.bos_token_id]

    def chat_row(self, prompt: str, system: str | None = None, response: str = "") -> Row:
        """`prompt` in the chat template up to where the answer begins, then `response` as given.

        The rendered template is tokenised without special tokens, as `apply_chat_template` does it, and begins with
        exactly one BOS where the tokenizer adds one. Raises ValueError for a blank prompt, a missing template, and a
        template that does not hold the prompt's own words, since nothing else shows where the instruction ends, or
        those of the system prompt.
        """
        if not prompt.strip():
            raise ValueError("a prompt is empty; give it at least one word")
        rendered = self._rendered(prompt, system)
        for what, text in (("prompt", prompt), ("system prompt", system or "")):
            if text.strip() not in rendered:
                raise ValueError(f"the chat template of {self.path} does not hold the {what} {text[:40]!r} as it is")
        return self._row(self._begun(rendered), response)

    def raw_row(self, prompt: str, response: str = "") -> Row:
        """`prompt` without any template, exactly one BOS in front where the tokenizer adds one."""
        if not prompt.strip():
            raise ValueError("a prompt is empty; give it at least one word")
        return self._row(self._begun(prompt), response)

    def _row(self, ids: list[int], response: str) -> Row:
        if not ids:
            raise ValueError(f"the tokenizer at {self.path} finds no token in a prompt")
        return Row(tuple(ids + self.plain_ids(response)), len(ids) - 1)

    def _begun(self, text: str) -> list[int]:
        """The ids of a text that a row begins with, one BOS in front where the tokenizer adds one."""
        ids, bos = self.plain_ids(text), self.hf.bos_token_id
        if not self._adds_bos:
            return ids
        return [bos, *itertools.dropwhile(lambda token: token == bos, ids)]

    def plain_ids(self, text: str) -> list[int]:
        """The ids of `text` with no special token added."""
        with reading(self.path, f"cannot read the text {text[:40]!r}"):
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
        with reading(self.path):
            return self.hf.batch_decode(rows, skip_special_tokens=True)
