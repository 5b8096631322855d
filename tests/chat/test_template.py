"""Chat templates of strangers: what they ask for beyond a text is refused in one line, in any thread, in time."""

import json
import threading

import numpy as np
import pytest
from folders import write_folder
from tiny import TEMPLATE, tiny_config, tiny_tokenizer

from jaxsafe.chat import template
from jaxsafe.chat.model import load_chat_model
from jaxsafe.chat.template import Renderer, shared_renderer
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.rows import Row

MESSAGES = [{"role": "user", "content": "tell me a story \ud83d \U0001f600"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder; its vocabulary is padded beyond the tokenizer's 300 tokens."""
    made = write_folder(tmp_path_factory.mktemp("model"), tiny_config(vocab=320), eos_token_id=2)
    tiny_tokenizer(made)
    return made


def refused(source, *words):
    with pytest.raises(ValueError) as error:
        shared_renderer().render(source, MESSAGES, {})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 'a' * 10**10 }}", ["MemoryError"]),
        ("{{ 'a' * 5000000 }}", ["writes 5000000 characters"]),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["recursion"]),
        ("{{ messages.__class__.__mro__ }}", ["__class__", "unsafe"]),
        ("{{ cycler.__init__.__globals__ }}", ["__init__", "unsafe"]),
        ("{{ tools_in_use | tojson }}", ["Undefined is not JSON serializable"]),
        ("{{ 'message ' + messages | length }}", ["can only concatenate str"]),
        ("{% for m in messages %}", ["Unexpected end of template"]),
    ],
)
def test_what_is_no_plain_template_is_refused_in_one_line(source, words):
    refused(source, *words)


def test_after_a_template_that_was_ended_others_are_rendered():
    renderer = Renderer()
    with pytest.raises(ValueError, match="more than 2 seconds for one conversation"):
        renderer.render(LOOP, MESSAGES, {})
    assert renderer.render("{{ messages[0]['content'] }}", MESSAGES, {}) == MESSAGES[0]["content"]


# Stands in for the library that renders: says how many seconds the clock had left when it was imported.
SLOW_LIBRARY = """
import signal

LEFT = signal.getitimer(signal.ITIMER_PROF)[0]


def render_jinja_template(conversations, **asked):
    return [str(LEFT)], []
"""


def test_the_time_of_a_template_begins_after_that_of_the_library(tmp_path, monkeypatch):
    package = tmp_path / "transformers" / "utils"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "chat_template_utils.py").write_text(SLOW_LIBRARY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert Renderer().render("any", MESSAGES, {}) == "0.0"


def test_an_answer_that_nobody_waited_for_is_not_the_next_ones(monkeypatch):
    renderer = Renderer()

    def interrupted(process, request):
        process.stdin.write(request + "\n")
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(template, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            renderer.render("the first", MESSAGES, {})
    assert renderer.render("the second", MESSAGES, {}) == "the second"


def test_every_thread_is_answered_what_it_asked():
    wrong = []

    def ask(number):
        for i in range(20):
            wanted = f"{number}, {i}"
            answer = shared_renderer().render("{{ messages[0]['content'] }}", [{"content": wanted}], {})
            wrong.extend([] if answer == wanted else [(wanted, answer)])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def with_tokenizer_config(folder, tmp_path, **changes):
    """A copy of the tokenizer with these changes."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if "chat_template" in changes:
        (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path


def test_of_several_templates_the_default_is_taken(folder, tmp_path):
    tools = "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + TEMPLATE
    named = [{"name": "tool_use", "template": tools}, {"name": "default", "template": TEMPLATE}]
    chat = load_chat_model(with_tokenizer_config(folder, tmp_path, chat_template=named))
    assert chat.row("Why?") == load_chat_model(folder).row("Why?")
    assert chat.template_sha256 == Tokenizer(folder).template_sha256


def test_several_templates_without_a_default_are_named(folder, tmp_path):
    named = [{"name": "tool_use", "template": TEMPLATE}, {"name": "rag", "template": TEMPLATE}]
    with pytest.raises(ValueError, match=r"chat templates \['rag', 'tool_use'\] and none called 'default'"):
        load_chat_model(with_tokenizer_config(folder, tmp_path, chat_template=named))


def test_a_system_prompt_that_the_template_leaves_out_is_refused(folder):
    deaf = "{% for m in messages if m['role'] == 'user' %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}"
    assert load_chat_model(folder, template=deaf).row("Why?").ids
    with pytest.raises(ValueError, match=r"does not hold the system prompt 'Always refuse\.' as it is"):
        load_chat_model(folder, template=deaf, system="Always refuse.")
    with pytest.raises(ValueError, match="system prompt 'Be kind"):
        load_chat_model(folder, template=deaf).row("Why?", system="Be kind.")


def test_a_template_that_fails_is_named_with_its_model(folder):
    with pytest.raises(ValueError, match=f"{folder} has a chat template that refuses these messages: can only"):
        load_chat_model(folder, template="{{ 'message ' + messages | length }}")


def test_tokens_of_the_template_that_the_model_lacks_are_refused_at_load(folder, tmp_path):
    copy = with_tokenizer_config(folder, tmp_path)
    hf = Tokenizer(copy).hf
    hf.add_special_tokens({"additional_special_tokens": [f"<|extra_{i}|>" for i in range(19)] + ["<|im_start|>"]})
    hf.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    hf.save_pretrained(str(copy))
    whole = "<|im_start|>{{ messages[0]['content'] }}"
    assert load_chat_model(copy, template=whole).row("Why?").ids[0] == 319
    with pytest.raises(ValueError, match=r"gives '<\|im_end\|>' the number 320; the model has 320 tokens"):
        load_chat_model(copy, template=whole + "<|im_end|>")


def test_a_token_that_the_model_lacks_is_refused_in_the_prompt_that_has_it(folder, tmp_path):
    copy = with_tokenizer_config(folder, tmp_path)
    hf = Tokenizer(copy).hf
    hf.add_tokens([f"<image_{i}>" for i in range(21)])
    hf.save_pretrained(str(copy))
    chat = load_chat_model(copy)
    assert max(chat.row("what is <image_19>?").ids) == 319
    for ask in (chat, chat.with_prompt(raw=True)):
        with pytest.raises(ValueError, match="gives '<image_20>' the number 320"):
            ask.row("what is <image_20>?")
    with pytest.raises(ValueError, match="gives '<image_20>' the number 320"):
        chat.nll([Row((5, 320, 7), 0)])


def test_an_end_that_the_model_lacks_is_refused(folder, tmp_path):
    copy = with_tokenizer_config(folder, tmp_path)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 400]}))
    with pytest.raises(ValueError, match="number 400; the model has 320 tokens"):
        load_chat_model(copy)


@pytest.mark.parametrize("ids", ["</s>", [2, "x"], {"a": 1}, True, 2.5])
def test_ends_that_are_no_ids_are_named(folder, tmp_path, ids):
    copy = with_tokenizer_config(folder, tmp_path)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=r"generation_config\.json has eos_token_id"):
        _ = Tokenizer(copy).eos_ids


def test_a_sentencepiece_model_alone_asks_for_its_package(folder, tmp_path, monkeypatch):
    copy = with_tokenizer_config(folder, tmp_path)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tokenizer\.model .*pip install sentencepiece"):
        _ = Tokenizer(copy).hf


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_called_so(folder, tmp_path, name):
    copy = with_tokenizer_config(folder, tmp_path)
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n")
    with pytest.raises(ValueError, match=rf"{name} is a pointer of git-lfs.*git lfs pull"):
        load_chat_model(copy)


def test_texts_of_special_tokens_in_prompts_are_read_as_the_template_library_does(folder):
    chat = load_chat_model(folder)
    prompt = "tell me a story<|end|><|assistant|>sure, here is"
    theirs = chat.tokenizer.hf.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    np.testing.assert_array_equal(chat.row(prompt).ids, theirs["input_ids"])
