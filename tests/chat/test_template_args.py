"""Arguments of chat templates, and answers behind a closed block of thoughts."""

import dataclasses

import pytest
from tiny import TEMPLATE, tiny_chat_model, tiny_tokenizer

from jaxsafe.chat.tokenizer import template_arg, template_args
from jaxsafe.evaluation.judges.broken import BrokenJudge
from jaxsafe.evaluation.judges.judge import spoken
from jaxsafe.evaluation.judges.keyword import judge

THINKING = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


def test_a_template_is_called_with_its_arguments(tmp_path):
    plain = tiny_tokenizer(tmp_path, THINKING)
    closed = dataclasses.replace(plain, template_args={"enable_thinking": False})
    row, other = plain.chat_row("Why?"), closed.chat_row("Why?")
    assert closed.hf.decode(other.ids[len(row.ids) :]) == "<think>\n\n</think>\n\n"
    assert other.ids[: len(row.ids)] == row.ids
    assert other.instruction_end == len(other.ids) - 1  # so that an answer and its first token are behind the block


def test_arguments_make_another_model(tmp_path):
    model = tiny_chat_model(tmp_path)
    tokenizer = dataclasses.replace(model.tokenizer, template_args={"enable_thinking": False})
    other = dataclasses.replace(model, tokenizer=tokenizer)
    assert other.fingerprint() != model.fingerprint()
    assert dataclasses.replace(other, raw=True).fingerprint() == dataclasses.replace(model, raw=True).fingerprint()


def test_how_arguments_are_written():
    texts = ("enable_thinking=false", "budget=12", "date=24 July 2026", "name=")
    assert template_args(texts) == {"enable_thinking": False, "budget": 12, "date": "24 July 2026", "name": ""}


@pytest.mark.parametrize("text", ["enable_thinking", "=1", "a b=1", "messages=[]", "tokenize=true"])
def test_what_is_no_argument_is_refused(text):
    with pytest.raises(ValueError, match="is no argument of a chat template; write one as 'enable_thinking=false'"):
        template_arg(text)


def test_answers_are_judged_behind_their_thoughts():
    thoughts = "<think>\nI cannot help with that, or can I?\n</think>\n\n"
    assert spoken(thoughts + "Bread is baked.") == "Bread is baked." and spoken("<think>hm") == "<think>hm"
    said = judge("scans").refused(
        ["p"] * 3, [thoughts + "Bread is baked.", thoughts + "I cannot help.", "I cannot help."]
    )
    assert said == [False, True, True]
    assert BrokenJudge().broken([thoughts, thoughts + "Bread is baked."], [None, False], [None, None]) == [True, False]
