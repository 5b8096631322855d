"""Chat rows from small tokenizers and templates made here."""

import json

import pytest
from tiny import PROMPTS, TEMPLATE, tiny_tokenizer

from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.rows import Row, check_context

UNK, BOS, EOS, USER, ASSISTANT, SYSTEM, END = range(7)
WITH_BOS = "{{ bos_token }}" + TEMPLATE
TWICE_BOS = "{{ bos_token }}" + WITH_BOS
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|system|>be kind<|end|>' }}{% endif %}" + TEMPLATE
# Words between the marks of roles, as in Llama 2: cut differently in context than alone.
WORDY = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} [/end]{% endfor %}"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens the tokenizer of given options, each made once."""
    made = {}

    def open_(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), **options)
        return made[key]

    return open_


@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("template", "given"), [(TEMPLATE, 0), (WITH_BOS, 1), (TWICE_BOS, 2)], ids=["no bos", "bos", "two bos"]
)
def test_a_row_is_the_template_with_one_bos_where_the_tokenizer_adds_one(opened, template, given, around):
    tokenizer = opened(template=template, around=around)
    for prompt in PROMPTS:
        row = tokenizer.chat_row(prompt)
        words = tokenizer.plain_ids(prompt)
        front = [BOS] * given if around == "$A" else [BOS]
        assert list(row.ids) == [*front, USER, *words, END, ASSISTANT]
        assert row.instruction_end == len(row.ids) - 1


@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>"])
def test_the_ids_of_the_template_are_those_that_apply_chat_template_gives(opened, around):
    tokenizer = opened(template="{{ bos_token }}" + WORDY, around=around)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": PROMPTS[0]}]
    wanted = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(tokenizer.chat_row(PROMPTS[0], "Be short.").ids) == list(wanted)
    assert wanted.count(BOS) == 1


def test_the_system_prompt_is_given_left_to_the_template_or_empty(opened):
    tokenizer = opened(template=DEFAULT_SYSTEM)
    user = [USER, *tokenizer.plain_ids("Why?"), END, ASSISTANT]
    assert list(tokenizer.chat_row("Why?").ids) == [SYSTEM, *tokenizer.plain_ids("be kind"), END, *user]
    assert list(tokenizer.chat_row("Why?", "be short").ids) == [SYSTEM, *tokenizer.plain_ids("be short"), END, *user]
    assert list(tokenizer.chat_row("Why?", "").ids) == [SYSTEM, END, *user]
    assert list(opened().chat_row("Why?").ids) == user


def test_a_response_stands_behind_the_instruction_end(opened):
    for tokenizer in (opened(), opened(template=WITH_BOS, around="<s> $A </s>")):
        bare, row = tokenizer.chat_row("Why?"), tokenizer.chat_row("Why?", response=" Sure, the sky")
        assert row.instruction_end == len(bare.ids) - 1
        assert row.ids == bare.ids + tuple(tokenizer.plain_ids(" Sure, the sky"))
        assert tokenizer.hf.decode(list(row.ids[row.instruction_end + 1 :])) == " Sure, the sky"


def test_rows_take_a_system_prompt_and_responses_of_their_own(opened):
    tokenizer = opened()
    rows = tokenizer.rows(PROMPTS[:2], "Be short.", ["One", "Two"])
    assert rows == [tokenizer.chat_row(p, "Be short.", r) for p, r in zip(PROMPTS[:2], ("One", "Two"), strict=True)]
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        tokenizer.rows(PROMPTS[:2], responses=["One"])


def test_chat_is_a_left_padded_batch(opened):
    tokenizer = opened()
    batch = tokenizer.chat(PROMPTS[:3])
    for i, prompt in enumerate(PROMPTS[:3]):
        row = tokenizer.chat_row(prompt)
        assert tuple(batch.tokens[i, batch.valid[i]].tolist()) == row.ids
        assert batch.valid[i, -len(row.ids) :].all()
    assert (batch.instruction_end == batch.tokens.shape[1] - 1).all()
    assert tokenizer.chat(PROMPTS[:3], length=64).tokens.shape == (3, 64)


def test_raw_rows_have_no_template_and_no_end(opened):
    words, more = opened().plain_ids(PROMPTS[0]), opened().plain_ids(" yes")
    assert opened(template=None).raw_row(PROMPTS[0]) == Row(tuple(words), len(words) - 1)
    for around in ("<s> $A", "<s> $A </s>"):
        tokenizer = opened(template=None, around=around)
        assert tokenizer.raw_row(PROMPTS[0]) == Row((BOS, *words), len(words))
        assert tokenizer.raw_row(PROMPTS[0], " yes") == Row((BOS, *words, *more), len(words))


@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("given", [0, 1, 2])
def test_raw_rows_that_begin_with_bos_have_no_second_one(opened, around, given):
    tokenizer = opened(template=None, around=around)
    words, front = tokenizer.plain_ids(PROMPTS[0]), [BOS] * (given if around == "$A" else 1)
    row = tokenizer.raw_row("<s>" * given + PROMPTS[0], " yes")
    assert row == Row((*front, *words, *tokenizer.plain_ids(" yes")), len(front) + len(words) - 1)


def test_a_template_of_ones_own_takes_the_place_of_the_folders(opened):
    for shipped in (TEMPLATE, None):
        own = opened(template=shipped, override="Q: {{ messages[0]['content'] }} A:")
        assert list(own.chat_row("Why?").ids) == own.plain_ids("Q: Why? A:")
        assert own.template_sha256 != opened().template_sha256


def test_a_tokenizer_without_a_template_says_so(opened):
    with pytest.raises(ValueError, match="has no chat template; give one, or use raw prompts"):
        opened(template=None).chat_row("Why?")


def test_a_template_that_refuses_the_system_role_says_so_in_one_line(opened):
    tokenizer = opened(template=NO_SYSTEM)
    assert tokenizer.chat_row("Why?").ids[0] == USER
    with pytest.raises(ValueError, match="refuses these messages: System role not supported") as caught:
        tokenizer.chat_row("Why?", "Be short.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0]['content'] | upper }}", "{{ messages[0]['content'] | replace(' ', '_') }}", "nothing at all"],
)
def test_a_template_that_alters_the_prompt_is_refused(opened, template):
    with pytest.raises(ValueError, match="does not hold the prompt 'how do boats float' as it is"):
        opened(template=template).chat_row("how do boats float")


def test_space_around_a_prompt_is_left_to_the_template(opened):
    tokenizer = opened(template=WORDY)
    assert tokenizer.chat_row("  Why? \n") == tokenizer.chat_row("Why?")


@pytest.mark.parametrize("blank", ["", "  \n\t"])
def test_a_blank_prompt_is_refused(opened, blank):
    for make in (opened().chat_row, opened().raw_row):
        with pytest.raises(ValueError, match="a prompt is empty"):
            make(blank)


def test_decode_stops_at_the_length_and_leaves_special_tokens_out(opened):
    tokenizer = opened()
    one, two = tokenizer.plain_ids("the rules"), tokenizer.plain_ids("kites")
    width = max(len(one), len(two)) + 2
    tokens = [ids + [END] + [USER] * (width - len(ids) - 1) for ids in (one, two)]
    assert tokenizer.decode(tokens, [len(one), len(two)]) == ["the rules", "kites"]
    assert tokenizer.decode(tokens, [width, 0]) == ["the rules", ""]


@pytest.mark.parametrize(("eos", "wanted"), [(None, (2,)), (6, (2, 6)), ([6, 4, 2], (2, 4, 6))])
def test_every_end_of_text_token_is_known(opened, eos, wanted):
    assert opened(eos=eos).eos_ids == wanted


def test_the_config_may_name_an_end_of_text_token_too(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, eos=[6])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 4}))
    assert tokenizer.eos_ids == (2, 4, 6)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json or tokenizer.model in"):
        Tokenizer(tmp_path).chat_row("Why?")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        Tokenizer(tmp_path / "absent").chat_row("Why?")


def test_the_row_that_exceeds_the_context_is_named():
    rows = [Row((1,) * n, n - 1) for n in (5, 20, 30)]
    check_context(rows, 30)
    check_context(rows, 34, 4)
    with pytest.raises(ValueError, match=r"prompt 1 needs 20 tokens; the model's context is 19 tokens"):
        check_context(rows, 19)
    with pytest.raises(ValueError, match=r"prompt 2 needs 30 tokens \+ 5 new ones; the model's context is 34 tokens"):
        check_context(rows, 34, 5)
    texts = ["why?", "how do\ni leave? " + "again and " * 40, "what?"]
    with pytest.raises(
        ValueError, match=r"^prompt 2 of mine \('how do i leave\? again and again and .*\.\.\.'\) needs 20"
    ):
        check_context(rows, 19, name="mine", texts=texts)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_torn_file_is_refused_by_one_error_that_names_it(tmp_path, name):
    tiny_tokenizer(tmp_path, eos=2)
    (tmp_path / name).write_text('{"added_tokens":')
    with pytest.raises(ValueError, match=str(tmp_path)):
        _ = Tokenizer(tmp_path).eos_ids
