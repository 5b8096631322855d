"""The tokenizer that a GGUF file's metadata describe, rebuilt with the `tokenizers` library."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4
# Texts of tokens that end an answer whatever a file's keys name, as llama.cpp has it.
ENDS = frozenset(
    """
    <|eot_id|> <|eom_id|> <|end_of_text|> <|im_end|> <|endoftext|> <|end|> <end_of_turn> <end_of_utterance> <EOT> _<EOT>
    [EOT] [EOS]
    """.split()
)
# How text is cut into words before merging, by `tokenizer.ggml.pre`. None: the pattern of GPT-2.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As Llama 3, but each digit stands alone.
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
WORDS = {
    "llama-bpe": LLAMA3_WORDS,
    "dbrx": LLAMA3_WORDS,
    "smaug-bpe": LLAMA3_WORDS,
    "qwen2": QWEN2_WORDS,
    "tekken": TEKKEN_WORDS,
    "smollm": None,
    "gpt-2": None,
}
# Other names that converters write for these.
ALIASES = {
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "falcon3": "llama-bpe",
    "falcon-h1": "llama-bpe",
    "lfm2": "llama-bpe",
    "midm-2.0": "llama-bpe",
    "pixtral": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "kormo": "qwen2",
    "gpt2": "gpt-2",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
}
# Vocabularies of texts whose letters are composed (Unicode's form C).
COMPOSED = ("qwen2",)
# Vocabularies whose digits each stand alone before GPT-2's pattern is applied.
SINGLE_DIGITS = ("smollm",)
# Vocabularies in which a word that is a token as a whole is never built up by merges.
WHOLE_WORDS = ("llama-bpe", "tekken")


def build_tokenizer(fields: Mapping[str, Any], context: int) -> "PreTrainedTokenizerFast":
    """The tokenizer of `fields`, the metadata under `tokenizer.` ("ggml.tokens": [...], "chat_template": ...).

    Raises ValueError for a kind of tokenizer or a way to cut words that is not known, by name.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = fields.get("ggml.model")
    if kind not in kinds:
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported; use one of {sorted(kinds)}")
    tokens = _texts(fields, "ggml.tokens")
    types = _entries(fields, "ggml.token_type", int) if "ggml.token_type" in fields else [1] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    tokenizer = kinds[kind](fields)
    whole = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in whole if k == CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in whole if k == USER_DEFINED])
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {name: _number(fields, key) for name, key in keys.items()}
    named = {f"{name}_token": tokens[number] for name, number in numbers.items() if number is not None}
    _wrap(tokenizer, fields, named)
    template = fields.get("chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"tokenizer.chat_template is {template!r:.40}; a text is expected")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **named,
    )


def ends(fields: Mapping[str, Any]) -> list[int]:
    """The ids of all tokens that end an answer: those that `fields` name, and those known by their text."""
    named = [_number(fields, key) for key in ("eos", "eot", "eom")]
    known = [number for number, token in enumerate(_texts(fields, "ggml.tokens")) if token in ENDS]
    return sorted({number for number in (*named, *known) if number is not None})


def _entries(fields: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """The list `key` of values of `kind`. Raises ValueError where there is none, or one of something else."""
    if key not in fields:
        raise ValueError(f"has no key tokenizer.{key}, which its tokenizer needs")
    values = fields[key]
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"tokenizer.{key} is {values!r:.40}; a list of {kind.__name__} is expected")
    return values


def _texts(fields: Mapping[str, Any], key: str) -> list[str]:
    return _entries(fields, key, str)


def _number(fields: Mapping[str, Any], key: str) -> int | None:
    """The id of the token that `fields` name for `key`; None where they name none. Raises ValueError for no id."""
    key = f"ggml.{key}_token_id"
    number, size = fields.get(key), len(_texts(fields, "ggml.tokens"))
    if number is not None and not (isinstance(number, int) and 0 <= number < size):
        raise ValueError(f"tokenizer.{key} is {number!r:.40}; the vocabulary has {size} tokens")
    return number


def _byte_level(fields: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _words_of(fields)
    if pre not in WORDS:
        raise ValueError(f"tokenizer.ggml.pre {pre!r} is not supported; use one of {sorted(WORDS)}")
    merges = _texts(fields, "ggml.merges")
    if other := next((merge for merge in merges if merge.count(" ") != 1), None):
        raise ValueError(f"tokenizer.ggml.merges has {other!r}; two parts with a space between are expected")
    words = WORDS[pre]
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre in SINGLE_DIGITS else []
    if words is not None:
        cuts.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    prefix = bool(fields.get("ggml.add_space_prefix"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=words is None))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(_texts(fields, "ggml.tokens"))},
            merges=[(left, right) for left, _, right in (merge.partition(" ") for merge in merges)],
            ignore_merges=pre in WHOLE_WORDS,
        )
    )
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _words_of(fields: Mapping[str, Any]) -> Any:
    """How the file says that text is cut into words, by the name known here."""
    pre = fields.get("ggml.pre")
    return ALIASES.get(pre, pre) if isinstance(pre, str) else pre


def _sentencepiece(fields: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, space = _texts(fields, "ggml.tokens"), "\N{LOWER ONE EIGHTH BLOCK}"
    scores = _entries(fields, "ggml.scores", float)
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    prefix = fields.get("ggml.add_space_prefix") is not False
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=_merges(tokens, scores),
            unk_token=tokens[_number(fields, "unknown") or 0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spell = [normalizers.Prepend(space)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spell, normalizers.Replace(" ", space)])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third, best score first, as SentencePiece merges them.

    Of two ways to make the same token the one with the longer left part comes first, as in the files that
    transformers converts.
    """
    vocab = set(tokens)
    pairs = [
        (-score, -cut, cut - len(token), token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [(left, right) for *_, left, right in sorted(pairs, key=lambda pair: pair[:3])]


def _wrap(tokenizer: "Tokenizer", fields: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Puts the tokens that mark begin and end around a text, where the file asks for them."""
    from tokenizers import processors

    starts = fields.get("ggml.model") == "llama" or _words_of(fields) == "llama-bpe"
    bos = named.get("bos_token") if fields.get("ggml.add_bos_token", starts) else None
    eos = named.get("eos_token") if fields.get("ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return
    text = " ".join(part for part in (bos, "$A", eos) if part)
    second = " ".join(f"{part}:1" for part in (bos, "$B", eos) if part)
    marks = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=text, pair=f"{text} {second}", special_tokens=marks)
