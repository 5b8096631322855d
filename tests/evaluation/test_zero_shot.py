"""lm-eval's requests against its own `hf` model on the same weights, and accuracies of tasks made on the spot."""

import dataclasses
import functools
import json
import random
import sys
import types

import jax
import numpy as np
import pytest
from tiny import PROMPTS, tiny_config, tiny_params, tiny_tokenizer

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.stats import mean_rate, rate
from jaxsafe.evaluation.zero_shot import (
    PUBLISHED,
    PUBLISHED_ORTHOGONAL,
    Shuffled,
    load_tasks,
    task_perplexity,
    zero_shot,
)
from jaxsafe.io.hf import save_hf
from jaxsafe.kernels.likelihood import likelihood
from jaxsafe.model.transformer import forward
from jaxsafe.parallel import parse_mesh
from jaxsafe.rows import Row, pad_rows

LONG = " ".join(PROMPTS) * 4
PAIRS = [
    ("How do I bake", " bread for a picnic?"),
    ("The tallest tree is ", "in the northern forest"),
    ("", "Rivers and boats"),
    ("", "<s>Lanterns"),
    ("<s>Who invented", " the kite?"),
    (LONG, " the sky"),
    ("Why?", " " + LONG[:150]),
    *((prompt, f" {word}") for prompt in PROMPTS for word in ("yes", "no", "a spoon")),
]


def tiny_model(folder, around="$A"):
    """A random model that writes printable text and often ends it, with its tokenizer; also as Hugging Face folder."""
    tokenizer = tiny_tokenizer(folder / "tokenizer", around=around, eos=2)
    config = tiny_config()
    params = tiny_params(config)
    plain = [tokenizer.hf.decode([i]).isascii() and tokenizer.hf.decode([i]).isprintable() for i in range(config.vocab)]
    liking = np.where(plain, 1, 0.1)
    liking[:7] = [0.1, 0.1, 1.4, 0.1, 0.1, 0.1, 0.1]
    params["unembed"] = params["unembed"] * liking[None].astype(np.float32)
    save_hf(folder / "model", config, params, like=folder / "tokenizer")
    return ChatModel("tiny", config, params, tokenizer)


@pytest.fixture(scope="module", params=["$A", "<s> $A"], ids=["plain", "bos"])
def pair(request, tmp_path_factory):
    """The same model twice: `ours` in this library, `theirs` in PyTorch."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("torch").set_num_threads(1)
    from lm_eval.models.huggingface import HFLM

    from jaxsafe.evaluation.lm_eval import Adapter

    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(folder, request.param)
    theirs = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=8)
    return types.SimpleNamespace(model=model, ours=Adapter(model, batch_size=8), theirs=theirs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def asked(kind, arguments):
    """lm-eval's requests of one kind."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def test_loglikelihood(pair):
    requests = asked("loglikelihood", PAIRS)
    ours, theirs = pair.ours.loglikelihood(requests), pair.theirs.loglikelihood(requests)
    np.testing.assert_allclose([o[0] for o in ours], [t[0] for t in theirs], atol=1e-4, rtol=1e-5)
    assert [o[1] for o in ours] == [t[1] for t in theirs]
    assert all(type(total) is float and type(greedy) is bool for total, greedy in ours)
    assert len(pair.ours.tok_encode(LONG)) > pair.model.config.context


def greedy_tail(model, ids, new):
    """The `new` most likely tokens behind `ids`, one forward pass a token."""
    whole, tail = jax.jit(forward, static_argnums=0), []
    for _ in range(new):
        batch = pad_rows([Row((*ids, *tail), 0)], length=model.config.context)
        tail.append(int(whole(model.config, model.params, batch.tokens, batch.valid)[0, -1].argmax()))
    return tail


def test_a_greedy_continuation_is_told_and_a_long_context_is_cut_from_the_left(pair):
    context = pair.ours.tok_encode(LONG)
    room = pair.model.config.context + 1
    requests = []
    for ids, kept in [(context[:9], context[:9]), (context, context[-(room - 6) :])]:
        tail = greedy_tail(pair.model, kept, 6)
        requests += [(None, ids, tail), (None, ids, [*tail[:5], tail[5] + 1]), (None, ids, [tail[0] + 1, *tail[1:]])]
    ours, theirs = pair.ours._loglikelihood_tokens(requests), pair.theirs._loglikelihood_tokens(requests)
    np.testing.assert_allclose([o[0] for o in ours], [t[0] for t in theirs], atol=1e-4, rtol=1e-5)
    assert [o[1] for o in ours] == [t[1] for t in theirs] == [True, False, False] * 2


def test_rolling_loglikelihood(pair):
    requests = asked("loglikelihood_rolling", [(LONG,), ("Why?",), (LONG * 3,), ("",), *((p,) for p in PROMPTS)])
    ours, theirs = pair.ours.loglikelihood_rolling(requests), pair.theirs.loglikelihood_rolling(requests)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)
    assert len(pair.ours.tok_encode(LONG * 3)) > 3 * pair.model.config.context


def test_generations(pair):
    contexts = [*PROMPTS[:3], LONG, "<s>A kite"]
    alone = pair.ours.generate_until(asked("generate_until", [(c, {"max_gen_toks": 24}) for c in contexts]))
    free = max(alone, key=len)
    letters = [letter for letter in dict.fromkeys(free) if letter.isascii() and letter.isalpha()]
    settings = [
        {"until": [], "max_gen_toks": 24},
        {"until": letters[3], "max_gen_toks": 24},
        {"until": [letters[2], letters[1]], "max_gen_toks": 24, "do_sample": False, "temperature": 0.7},
        {"until": ["\n"], "max_gen_toks": 24, "repetition_penalty": 1.3},
    ]
    requests = asked("generate_until", [(c, dict(s)) for c in contexts for s in settings])
    ours = pair.ours.generate_until(requests)
    # A context at a time: of a batch, lm-eval looks for the begin-of-text token in the first context alone.
    theirs = [pair.theirs.generate_until(requests[4 * i : 4 * i + 4]) for i in range(len(contexts))]
    assert ours == [text for texts in theirs for text in texts]
    first = 4 * alone.index(free)
    assert ours[first : first + 3] == [free, free.split(letters[3])[0], free.split(letters[1])[0]]
    assert ours[3::4] != ours[::4] == alone


def test_some_generations_end_with_the_end_of_text(pair):
    many = asked("generate_until", [(p[:n], {"max_gen_toks": 40, "until": []}) for p in PROMPTS for n in (1, 2, 3)])
    lengths = [len(pair.ours.tok_encode(text, add_special_tokens=False)) for text in pair.ours.generate_until(many)]
    assert min(lengths) < 20 and max(lengths) > 30


def test_sampling_follows_its_options_and_the_seed(model):
    pytest.importorskip("lm_eval")
    from jaxsafe.evaluation.lm_eval import Adapter

    def answers(seed, **options):
        requests = asked("generate_until", [(PROMPTS[0], {"max_gen_toks": 12, **options})] * 3)
        return Adapter(model, seed=seed).generate_until(requests)

    greedy = answers(0)
    assert len(set(greedy)) == 1
    assert answers(0, temperature=0.9, do_sample=False) == answers(1, do_sample=True, top_k=1) == greedy
    drawn = answers(0, do_sample=True)
    assert len(set(drawn)) == 3
    assert drawn == answers(0, do_sample=True, temperature=1.0) == answers(0, temperature=1.0, top_p=None)
    assert drawn != answers(1, do_sample=True)
    with pytest.raises(ValueError, match="generation option 'num_beams' is not supported"):
        answers(0, num_beams=4)
    with pytest.raises(ValueError, match="160 new tokens leave no room"):
        answers(0, max_gen_toks=None, max_new_tokens=160)


def test_continuations_that_cannot_be_scored(model):
    pytest.importorskip("lm_eval")
    from jaxsafe.evaluation.lm_eval import Adapter

    for tail in ([], [9] * 161):
        with pytest.raises(ValueError, match=f"a continuation of {len(tail)} tokens"):
            Adapter(model)._loglikelihood_tokens([(None, [5], tail)])
    assert Adapter(model)._loglikelihood_tokens([]) == []


def test_the_chat_template_is_the_same(pair):
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert pair.ours.apply_chat_template(history) == pair.theirs.apply_chat_template(history)
    begun = [*history, {"role": "assistant", "content": "Because"}]
    ours = pair.ours.apply_chat_template(begun, add_generation_prompt=False)
    assert ours == pair.theirs.apply_chat_template(begun, add_generation_prompt=False)
    assert ours.endswith("Because")


WORDS = "bread chess rivers boats kite spoon kitchen winter tree lantern forest window".split()


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """A multiple choice, a perplexity and a generation task, each with its data, and two whose data are absent.

    lm-eval's own task files are read once for all tests.
    """
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)

    def words(n):
        return " ".join(rng.choice(WORDS, n))

    def task(name, docs, **fields):
        data = folder / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, docs)))
        usual = {"task": name, "dataset_path": "json", "test_split": "test"}
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(json.dumps({**usual, "dataset_kwargs": kwargs, **fields}))

    questions = [{"question": words(5), "choices": [words(2) for _ in range(3)], "label": i % 3} for i in range(30)]
    task(
        "tiny_choice",
        questions,
        output_type="multiple_choice",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="choices",
        doc_to_target="label",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        num_fewshot=3,
    )
    task(
        "tiny_prose",
        [{"text": words(n)} for n in (8, 60, 150)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    task(
        "tiny_answer",
        questions[:5],
        output_type="generate_until",
        doc_to_text="question",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": [" "], "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match"}],
    )
    task("tiny_absent", [], dataset_path="nobody-at-all/no-such-data", dataset_kwargs={})
    task("tiny_lost", [], dataset_kwargs={"data_files": {"test": str(folder / "lost.json")}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_tasks, "TaskManager", functools.cache(lm_eval_tasks.TaskManager))
        yield folder


@pytest.fixture(scope="module")
def tasks(task_folder):
    """The three tasks by name."""
    loaded = load_tasks(["tiny_choice", "tiny_prose", "tiny_answer"], task_folder)
    return {task.config.task: task for task in loaded}


def run_by_lm_eval(lm, tasks, **options):
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        task.set_config("num_fewshot", 0)
    return evaluate(lm=lm, task_dict=dict(tasks), bootstrap_iters=0, **options)


def test_local_tasks(pair, tasks):
    ours, theirs = (run_by_lm_eval(lm, tasks) for lm in (pair.ours, pair.theirs))
    for name, numbers in theirs["results"].items():
        for metric, value in numbers.items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    assert {"acc,none", "acc_norm,none"} <= theirs["results"]["tiny_choice"].keys()
    for ours_of, theirs_of in zip(ours["samples"]["tiny_choice"], theirs["samples"]["tiny_choice"], strict=True):
        for o, t in zip(ours_of["resps"], theirs_of["resps"], strict=True):
            assert o[0][0] == pytest.approx(t[0][0], abs=1e-4) and o[0][1] == t[0][1]
    answers = [[s["resps"] for s in run["samples"]["tiny_answer"]] for run in (ours, theirs)]
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1]


def test_accuracy(pair, tasks):
    choice = tasks["tiny_choice"]
    found = zero_shot(pair.model, [choice], limit=20, batch_size=8)
    theirs = run_by_lm_eval(pair.theirs, {"tiny_choice": choice}, limit=20)["samples"]["tiny_choice"]
    assert found["tiny_choice"] == rate([bool(sample["acc"]) for sample in theirs])
    assert found["tiny_choice"].n == 20 and 0 < found["tiny_choice"].value < 1
    assert found["mean"].value == found["tiny_choice"].value
    assert "boats" not in theirs[0]["arguments"][0][0].split("Question:")[0]
    chat = zero_shot(pair.model, [choice], limit=20, chat=True)["tiny_choice"]
    theirs = run_by_lm_eval(pair.theirs, {"tiny_choice": choice}, limit=20, apply_chat_template=True)
    assert chat.value == theirs["results"]["tiny_choice"]["acc,none"]
    assert "<|assistant|>" in theirs["samples"]["tiny_choice"][0]["arguments"][0][0]


def test_the_published_order_of_questions(model, tasks):
    from jaxsafe.evaluation.lm_eval import Adapter

    choice = tasks["tiny_choice"]
    order = list(range(30))
    random.Random(42).shuffle(order)
    task = run_by_lm_eval(Adapter(model), {"tiny_choice": choice})["samples"]["tiny_choice"]
    correct = {sample["doc_id"]: bool(sample["acc"]) for sample in task}
    found = zero_shot(model, [choice], limit=Shuffled(12))["tiny_choice"]
    assert found == rate([correct[i] for i in order[:12]])
    assert found != rate([correct[i] for i in range(12)])
    assert set(PUBLISHED_ORTHOGONAL) - set(PUBLISHED) == {"arc_easy"}


def test_perplexity_of_whole_texts(pair, tasks):
    prose = {"tiny_prose": tasks["tiny_prose"]}
    theirs = run_by_lm_eval(pair.theirs, prose)["results"]["tiny_prose"]
    found = task_perplexity(pair.model, list(prose.values()))["tiny_prose"]
    assert found.keys() == {"word_perplexity", "bits_per_byte"}
    for measure, value in found.items():
        assert value == pytest.approx(theirs[f"{measure},none"], rel=1e-4)
    with pytest.raises(ValueError, match=r"task 'tiny_choice' has no perplexity; it measures acc, acc_norm"):
        task_perplexity(pair.model, [tasks["tiny_choice"]])


def test_other_weights_and_devices(model, tasks):
    choice, heard = tasks["tiny_choice"], []
    first = zero_shot(model, [choice], limit=None, done=heard.append)["tiny_choice"]
    assert first.n == 30 and sum(heard) == 90
    programs = likelihood._cache_size()
    other = dataclasses.replace(model, params=tiny_params(model.config, seed=5))
    assert zero_shot(other, [choice], limit=None)["tiny_choice"].value != first.value
    assert likelihood._cache_size() == programs
    spread = dataclasses.replace(model, mesh=parse_mesh("data:-1"))
    assert zero_shot(spread, [choice], limit=None)["tiny_choice"] == first


def test_what_is_refused(model, tasks, task_folder):
    with pytest.raises(ValueError, match="task 'tiny_prose' has no accuracy; it measures word_perplexity"):
        zero_shot(model, [tasks["tiny_prose"]])
    with pytest.raises(ValueError, match="limit 0 must be at least 1"):
        zero_shot(model, [tasks["tiny_choice"]], limit=0)
    with pytest.raises(ValueError, match="lm-eval knows no task 'tiny_nothing'"):
        zero_shot(model, load_tasks(["tiny_nothing"], task_folder))
    for name in ("tiny_absent", "tiny_lost"):
        with pytest.raises(FileNotFoundError, match=f"the data of task '{name}'") as caught:
            load_tasks([name], task_folder)
        assert "\n" not in str(caught.value)


def test_the_published_tasks_are_known(task_folder):
    from lm_eval.tasks import TaskManager

    assert set(PUBLISHED) <= set(TaskManager(include_path=str(task_folder)).all_tasks)


def test_without_lm_eval(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for call in (load_tasks, lambda: zero_shot(model)):
        with pytest.raises(ValueError, match=r'pip install "jaxsafe\[eval\]"'):
            call()


def test_the_mean_of_shares_has_an_interval_that_covers():
    one = rate([True, False, True, True])
    alone = mean_rate({"one": one})
    assert alone.value == one.value and alone.n == 4
    np.testing.assert_allclose([alone.ci_low, alone.ci_high], [one.ci_low, one.ci_high])
    rng, truth, sizes = np.random.default_rng(0), np.array([0.3, 0.55, 0.9]), (40, 80, 60)
    covered = []
    for _ in range(400):
        draws = {str(n): rate((rng.random(n) < p).tolist()) for p, n in zip(truth, sizes, strict=True)}
        mean = mean_rate(draws)
        covered.append(mean.ci_low <= truth.mean() <= mean.ci_high)
    assert mean.n == 180 and mean.value == pytest.approx(np.mean([draw.value for draw in draws.values()]))
    assert 0.92 <= np.mean(covered) <= 0.98
    for bad in ({}, {"none": rate([None])}):
        with pytest.raises(ValueError, match="a mean needs at least one share"):
            mean_rate(bad)
