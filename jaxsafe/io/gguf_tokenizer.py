"""The tokenizer that a GGUF file's metadata describe, rebuilt with the `tokenizers` library."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4
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
    "qwen2": QWEN2_WORDS,
    "tekken": TEKKEN_WORDS,
    "smollm": None,
    "gpt-2": None,
}
# Other names that converters write for these.
ALIASES = {
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "gpt2": "gpt-2",
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
    tokenizer = kinds[kind](fields)
    tokens = fields["ggml.tokens"]
    types = fields.get("ggml.token_type") or [1] * len(tokens)
    whole = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in whole if k == CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in whole if k == USER_DEFINED])

    named = {}
    for name, key in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")]:
        number = fields.get(f"ggml.{key}_token_id")
        if number is not None:
            named[f"{name}_token"] = tokens[number]
    _wrap(tokenizer, fields, named)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("chat_template"),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **named,
    )


def _byte_level(fields: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _words_of(fields)
    if pre not in WORDS:
        raise ValueError(f"tokenizer.ggml.pre {pre!r} is not supported; use one of {sorted(WORDS)}")
    words = WORDS[pre]
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre in SINGLE_DIGITS else []
    if words is not None:
        cuts.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    prefix = bool(fields.get("ggml.add_space_prefix"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=words is None))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(fields["ggml.tokens"])},
            merges=[tuple(merge.split(" ")) for merge in fields["ggml.merges"]],
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

    tokens, space = fields["ggml.tokens"], "\N{LOWER ONE EIGHTH BLOCK}"
    prefix = fields.get("ggml.add_space_prefix") is not False
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=_merges(tokens, fields["ggml.scores"]),
            unk_token=tokens[fields.get("ggml.unknown_token_id") or 0],
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
