"""Every field of every config is read by something: another value gives another run, or is refused.

A run is described by what it asks of the library: how the model is loaded, what every variant follows from, what each
expensive step is given, and what its record says. The expensive steps themselves are stood in for.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from evidences import random_evidence
from launches import write_pairs

from configs.anatomy import base as anatomy_base
from configs.attack import base as attack_base
from configs.brittleness import base as brittleness_base
from configs.jailbreak import base as jailbreak_base
from configs.landscape import base as landscape_base
from configs.overrefusal import base as overrefusal_base
from configs.scans import base as scans_base
from configs.search import base as search_base
from jaxsafe.chat.model import load_chat_model
from jaxsafe.digest import arrays_sha256
from jaxsafe.kernels.actions import Add, Gated, named_span
from jaxsafe.kernels.gates import Open
from jaxsafe.kernels.units import Units
from jaxsafe.methods import brittleness as weight_edits
from jaxsafe.methods import remedies, scans_calibration
from jaxsafe.methods import scans as scans_method
from jaxsafe.methods.anatomy import UnitRoles
from jaxsafe.methods.brittleness import Material
from jaxsafe.methods.landscape import Ground
from jaxsafe.methods.overlaps import Parts
from jaxsafe.methods.refusal_direction import Direction
from jaxsafe.methods.remedies import Made
from jaxsafe.methods.unit_inputs import InputMoments
from jaxsafe.model.layers import LayerRange
from jaxsafe.records.anatomy import Gap
from jaxsafe.records.attack import LayerScan
from jaxsafe.records.overrefusal import Mended, Remedy
from jaxsafe.records.run import Rate, Result, Sample, plain
from jaxsafe.records.scans import Choice, Strength
from jaxsafe.rows import data_sha256
from jaxsafe.study.study import Examined, Study
from launch import anatomy, attack, brittleness, command, common, jailbreak, landscape, overrefusal, scans, search
from launch.progress import Clock

BASES = {
    "scans": scans_base,
    "overrefusal": overrefusal_base,
    "brittleness": brittleness_base,
    "attack": attack_base,
    "jailbreak": jailbreak_base,
    "anatomy": anatomy_base,
    "landscape": landscape_base,
    "search": search_base,
}
SCRIPTS = {
    "scans": scans,
    "overrefusal": overrefusal,
    "brittleness": brittleness,
    "attack": attack,
    "jailbreak": jailbreak,
    "anatomy": anatomy,
    "landscape": landscape,
    "search": search,
}
# What makes the base configs run on a tiny model and the built-in prompts.
SMALL = {
    "model": "tiny",
    "max_new_tokens": 4,
    "batch_size": 8,
    "passages": 2,
    "evaluation": ("builtin:harmful/test#5",),
    "harmless": ("builtin:plain/test#3",),
    "judge": "scans",
}
SMALL_BY_TASK = {
    "scans": {
        "anchors": ("builtin:harmful/anchor#4", "builtin:plain/anchor#4"),
        "calibration": ("builtin:harmful/calibration#4", "builtin:plain/calibration#4"),
    },
    "overrefusal": {
        "anchors": ("builtin:harmful/anchor#4", "builtin:plain/anchor#4"),
        "calibration": ("builtin:harmful/calibration#4", "builtin:plain/calibration#4"),
    },
    "brittleness": {
        "set_difference": ((0.3, 0.1),),
        "orthogonal": ((8, 8),),
        "samples": 6,
        "settings": ("vanilla",),
    },
    "attack": {
        "attacks": ("identity_shift#6",),
        "seeds": (0,),
        "tunings": ("full", "lora"),
        "freeze_weights": ((0.3, 0.1),),
        "freeze_ranks": (8,),
        "freeze_layers": ("find",),
        "over_refusal": ("builtin:lookalike/test#4",),
        "layer_start": (0.3, 0.7),
        "samples": 6,
    },
    "jailbreak": {
        "attacks": ("persona",),
        "calibration": ("builtin:harmful/calibration#4", "builtin:plain/calibration#4"),
        "temperatures": (0.5,),
        "top_ps": (0.5,),
        "top_ks": (5,),
        "scales": (0.5,),
        "controls": 1,
    },
    "anatomy": {
        "weights": (0.3, 0.1),
        "ranks": (8, 8),
        "controls": 1,
        "samples": 6,
        "malicious": ("builtin:harmful/calibration#4",),
        "normal": ("builtin:plain/calibration#4",),
    },
    "landscape": {"steps": 2, "draws": 1},
    "search": {
        "attack": "identity_shift#6",
        "validation": ("builtin:harmful/calibration#4",),
        "bound": 0.1,
        "trials": 2,
        "startup": 1,
        "seeds": (2,),
    },
}
# Another value of each field; a function of the pairs' file where it names a file. A mapping changes others, too,
# both times: what makes the field matter.
OTHER = {
    "model": "another",
    "adapter": "another",
    "dtype": "bfloat16",
    "mesh": "data:1,model:1",
    "chat_template": "{{ messages[0].content }}",
    "template_args": ("enable_thinking=false",),
    "system": "Be brief.",
    "raw": True,
    "seed": 1,
    "data": "nowhere",
    "evaluation": ("builtin:harmful/test#4",),
    "harmless": ("builtin:plain/test#2",),
    "settings": ("vanilla", "decoding"),
    "suffixes": lambda pairs: pairs,
    "judge": "wei2024",
    "expected": ("arXiv 2402.05162, table 6a",),
    "batch_size": 4,
    "max_new_tokens": 5,
    "repetition_penalty": 1.2,
    "text": lambda pairs: pairs,
    "passages": 1,
    "reading": "whole",
    "window": 9,
    "zero_shot": ("boolq",),
    "zero_shot_limit": 3,
    "zero_shot_order": "lm_eval_0.3",
    "anchors": ("builtin:harmful/anchor#5", "builtin:plain/anchor#4"),
    "calibration": ("builtin:harmful/calibration#5", "builtin:plain/calibration#4"),
    "vectors": "nowhere.safetensors",
    "scored": (1, 2),
    "threshold": 0.3,
    "layers": (1, 2),
    "alpha": 2.0,
    "alpha_rel": 0.2,
    "share_of": "difference",
    "alpha_grid": (0.5,),
    "kl_limit": 0.2,
    "max_drop": 0.1,
    "threshold_by": "roc",
    "calibration_tokens": 5,
    "remedies": ("mend",),
    "gate_layers": (1,),
    "missed": 0.1,
    "span": "end",
    "kl": 0.2,
    "strengths": (0.1,),
    "candidate_prompts": 3,
    "candidate_positions": 3,
    "published": "qwen2.5-7b",
    "scans_choice": ((0, 2), (1, 2), 0.5, 1.0),
    "dro_samples": 2,
    "dro_steps": 3,
    "base_model": "another",
    "safety": ("builtin:harmful/train#9",),
    "utility": ("builtin:plain/train#9",),
    "safety_pairs": lambda pairs: pairs,
    "utility_pairs": lambda pairs: pairs,
    "raw_pairs": True,
    "score_system": False,
    "samples": 5,
    "answer_tokens": 7,
    "scoring_judge": "jbb",
    "score": "wanda",
    "loss": "sum",
    "positions": "all",
    "per": "model",
    "score_batch_size": 3,
    "layers_at_a_time": 2,
    "use_diff": True,
    "by_row": ("top",),
    "sequential": ("top",),
    "set_difference": ((0.2, 0.1),),
    "top": (0.1,),
    "bottom": (0.1,),
    "n_of_m": ((2, 4),),
    "heads": (1,),
    "orthogonal": ((9, 8),),
    "top_ranks": (1,),
    "bottom_ranks": (1,),
    "controls": 2,
    "controls_by": ("norm",),
    "similarity_rank": 5,
    "jaccard_fraction": 0.2,
    "export": "dense",
    "attacks": ("identity_shift#5",),
    "rows": lambda pairs: pairs,
    "prefix": "Please: ",
    "poison": lambda pairs: pairs,
    "ratio": 0.5,
    "epochs": 3,
    "learning_rate": 0.1,
    "decay": 0.5,
    "wording": "alpaca",
    "tuning_batch_size": 2,
    "accumulation": 2,
    "remat": False,
    "weight_decay": 0.1,
    "own_tokens": 3,
    "seeds": (1,),
    "tunings": ("full",),
    "lora_rank": 4,
    "lora_alpha": 1.0,
    "lora_maps": ("q",),
    "lora_dropout": 0.1,
    "lora_learning_rate": 0.3,
    "lora_sweep": ((2, 0.1),),
    "lora_together": 2,
    "checkpoint_every": 1,
    "export_adapter": True,
    "freeze_weights": ((0.2, 0.1),),
    "freeze_ranks": (7,),
    "freeze_layers": ((0, 1),),
    "freeze_units": (0.5,),
    "rewinds": False,
    "over_refusal": ("builtin:lookalike/test#3",),
    "layer_alpha": 1.5,
    "layer_start": (0.0, 0.7),
    "layer_tokens": 5,
    "evaluate_every": 1,
    "evaluate_at": (1,),
    "openings": ("Yes",),
    "persona": "Obey.",
    "temperatures": (0.6,),
    "top_ps": (0.6,),
    "top_ks": (6,),
    "scaled_layers": (0, 1),
    "scales": (0.6,),
    "unit_shares": (0.02, 0.1, 0.1),
    "as_coded": True,
    "prune": ("safety",),
    "weights": (0.2, 0.1),
    "ranks": (9, 8),
    "draws": 3,
    "malicious": ("builtin:harmful/calibration#5",),
    "normal": ("builtin:plain/calibration#5",),
    "triples": 7,
    "reach": 0.3,
    "steps": 4,
    "plane_steps": 2,
    "other_model": "another",
    "toward": (0.5,),
    "together": 2,
    "attack": "identity_shift#5",
    "trials": 3,
    "startup": 2,
    "bound": 0.2,
    "utility_tasks": ("boolq",),
    "try_rates": (1e-5, 1e-4),
    "try_steps": (5,),
    "try_batch_sizes": (5,),
    "try_ranks": (),
    "try_schedules": ("constant",),
    "validation": ("builtin:harmful/calibration#5",),
}
BY_TASK = {("attack", "settings"): ("vanilla",), ("attack", "controls"): False, ("attack", "epochs"): 7}
BY_TASK |= {("overrefusal", "controls"): False, ("jailbreak", "attacks"): ("no_template",)}
BY_TASK |= {("landscape", "controls"): 1, ("landscape", "per"): "filter"}
BESIDE = {
    "data": {"evaluation": ("advbench#5",)},
    "suffixes": {"settings": ("vanilla", "suffix")},
    "score_system": {"system": "Be brief."},
    "raw_pairs": {"safety_pairs": lambda pairs: pairs},
    "zero_shot_limit": {"zero_shot": ("boolq",)},
    "zero_shot_order": {"zero_shot": ("boolq",)},
    "window": {"reading": "scans"},
    "ratio": {"poison": lambda pairs: pairs},
    "poison": {"ratio": 0.5},
    "wording": {"rows": lambda pairs: pairs},
    "own_tokens": {"attacks": ("benign#3",)},
    "use_diff": {"base_model": "another"},
    "by_row": {"top": (0.1,)},
    "sequential": {"top": (0.1,), "score": "wanda"},
    "threshold_by": {},
    ("attack", "prefix"): {"attacks": ("identity_shift#6",)},
    ("search", "own_tokens"): {"attack": "benign#3"},
    ("jailbreak", "suffixes"): {"attacks": ("suffix",)},
    ("jailbreak", "openings"): {"attacks": ("prefill",)},
    "layer_alpha": {"over_refusal": ("builtin:lookalike/calibration#4",)},
    "layer_tokens": {"over_refusal": ("builtin:lookalike/calibration#4",)},
    "toward": {"other_model": "another"},
    ("landscape", "controls"): {"other_model": "another"},
}
ATTACK_OF = {
    "decoding": ("temperatures", "top_ps", "top_ks"),
    "scaling": ("scaled_layers", "scales", "controls"),
    "ablation": ("calibration", "calibration_tokens", "candidate_prompts", "candidate_positions"),
}
BESIDE |= {("jailbreak", field): {"attacks": (attack,)} for attack, fields in ATTACK_OF.items() for field in fields}
FIELDS = [(task, field) for task, module in BASES.items() for field in module.base()]


class Recorder:
    """What a run asks of the library."""

    def __init__(self):
        self.calls = []

    def note(self, name, *content):
        self.calls.append([name, plain([described(part) for part in content])])


def described(value):
    """A value in values of JSON, as far as it has any."""
    if hasattr(value, "rule"):
        return [value.name, value.version]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__name__ == "ChatModel":
            return value.fingerprint()
        if type(value).__name__ == "Sampling":
            return [float(part) for part in dataclasses.astuple(value)]
        return {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): described(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    if isinstance(value, np.ndarray | jnp.ndarray):
        return arrays_sha256([value])
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


@pytest.fixture(scope="module")
def model(folder):
    return load_chat_model(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return str(write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")  # shared, so that sums are made once


@pytest.fixture(scope="module")
def usuals():
    return {}  # what a run asks for without a change, which most fields share


@pytest.fixture
def seen(model, monkeypatch):
    """A recorder in the place of everything that takes long."""
    seen = Recorder()

    def loaded(name, dtype=None, mesh=None, template=None, system=None, raw=False, template_args=None):
        seen.note("load", str(name), dtype, template, system, raw, described(template_args))
        return model.with_prompt(system, raw)

    def examined(study, variant):
        seen.note("examine", study.key(variant), described(variant), described(study.exam))
        sample = Sample(variant.name, "s", study.exam.settings[0].name, True, "", "p", "t", True, score=0.5)
        rates = dict.fromkeys(("asr_any/any", "zero_shot/boolq"), Rate(0.5, 0.0, 1.0, 2))
        study.examined[variant.name] = Examined(Result(variant, "", rates, 9.0, 1), (sample,), study.exam)
        return study.examined[variant.name].result

    def together(study, variants, make):
        for variant in variants:
            examined(study, variant)
        seen.note("rules", [rule and remedies.identity(rule) for rule in make().rules])

    def finished(study, task, config, roles, clock, details=None):
        datasets = common.data_records(roles)
        seen.note("finish", task, described(datasets), described(details), described(common.published(config)))

    monkeypatch.setattr(common, "load_chat_model", loaded)
    monkeypatch.setattr(command, "mesh_of", lambda *asked: seen.note("mesh", *map(str, asked)))
    monkeypatch.setattr(Study, "examine", lambda study, variant, make: examined(study, variant))
    monkeypatch.setattr(Study, "examine_together", together)
    monkeypatch.setattr(common, "finish", finished)
    stand_in_for_scans(monkeypatch, seen, model)
    stand_in_for_remedies(monkeypatch, seen, model)
    stand_in_for_weights(monkeypatch, seen)
    stand_in_for_parts(monkeypatch, seen, model.config)
    # What directions are made from is in what their variants follow from.
    monkeypatch.setattr(Ground, "directions", lambda ground, along: (model.params,) * len(along.points[0]))
    return seen


def stand_in_for_scans(monkeypatch, seen, model):
    L, D = model.config.layers, model.config.embed
    rng = np.random.default_rng(0)
    directions = scans_method.Directions(
        *(rng.standard_normal(shape).astype(np.float32) for shape in ((L, D), (L,), (L,), (L, D))),
        np.array([5], np.int32),
    )

    def found(store, asked, harmful, benign, batch_size, done):
        seen.note("directions", asked, harmful, benign, batch_size)
        return directions

    def read(store, asked, directions, prompts, batch_size, done):
        seen.note("reading", asked, prompts, batch_size)
        cosines, projections = rng.standard_normal((2, len(prompts), L))
        return scans_method.Reading(cosines.astype(np.float32), projections.astype(np.float32))

    def chosen(store, asked, directions, found, given, calibration, done):
        seen.note("choice", given, calibration)
        scored = given.scored or LayerRange(0, 2)
        choice = Choice(scored, LayerRange(1, 2), 0.5, alpha_rel=0.1)
        return choice, Strength(1.0, 0.1, 1, ()), np.linspace(0, 1, len(calibration.prompts))

    monkeypatch.setattr(scans_method, "directions_once", found)
    monkeypatch.setattr(scans_method, "reading_once", read)
    monkeypatch.setattr(scans_calibration, "choose_once", chosen)


def stand_in_for_remedies(monkeypatch, seen, model):
    L, D = model.config.layers, model.config.embed
    evidence = random_evidence(layers=L, embed=D)

    def gathered(store, asked, sets, judge, how, done):
        seen.note("evidence", asked, [s.prompts for s in sets], judge, how)
        return evidence

    def fitted(name):
        def make(bench):
            seen.note("fit", name, bench.fit, bench.trial)
            rule = Gated(Open(), Add(jnp.ones((L, D)), named_span("end")))
            return Made(rule, rule, Remedy(name, "ours", "", bench.gate.report.name))

        return make

    def refusal(bench):
        seen.note("direction", bench.fit, bench.trial)
        return Direction(np.ones(D, np.float32), 0, 0, 0.0, 0.0, 0.0, True)

    for launched in (overrefusal, jailbreak):
        monkeypatch.setattr(launched, "evidence_once", gathered)
    monkeypatch.setattr(remedies.Bench, "refusal", property(refusal))
    monkeypatch.setattr(remedies, "mend", lambda bench: (fitted("mend")(bench), Mended((), (), 1.0)))
    monkeypatch.setattr(remedies, "REMEDIES", {name: fitted(name) for name in remedies.REMEDIES})


def stand_in_for_weights(monkeypatch, seen):
    def own(store, asked, prompts, kept, done):
        seen.note("own answers", asked, prompts, kept)
        rows = asked.rows(prompts)
        return [dataclasses.replace(row, ids=(*row.ids, 9, 8)) for row in rows]

    def ran(work):
        study, cells, settings, rows, grid = work.study, work.cells, work.settings, work.rows, work.grid
        of = [cell.variant(settings.steps, settings, rows, grid.material, grid.guards) for cell in cells]
        keys = [study.key(variant) for variant in of]
        seen.note(
            "run",
            keys,
            described(of),
            settings,
            data_sha256(rows),
            grid.every,
            grid.at,
            grid.checkpoints is None,
            grid.adapters is None,
        )
        return {}

    def scanned(store, asked, prompts, judge, settings, done):
        seen.note("layers", asked, prompts, judge, settings)
        return LayerScan(0, 2, 0, (), ())

    def material(model, rows, store, settings, *rest):
        seen.note("scores", settings)
        return Material(model, rows, store, settings, *rest)

    monkeypatch.setattr(common, "Material", material)
    monkeypatch.setattr(common, "own_answers_once", own)
    monkeypatch.setattr(attack, "examine_run", ran)
    monkeypatch.setattr(attack, "examine_together", lambda work, most: seen.note("together", most))
    monkeypatch.setattr(attack, "safety_layers_once", scanned)
    monkeypatch.setattr(anatomy, "safety_layers_once", scanned)
    monkeypatch.setattr(
        attack.attacks,
        "own_texts",
        lambda model, prompts, max_new_tokens, batch_size: (
            seen.note("own texts", prompts, max_new_tokens) or ["fine."] * len(prompts)
        ),
    )
    monkeypatch.setattr(brittleness, "export", lambda config, material, point, out: seen.note("export", point))


def stand_in_for_parts(monkeypatch, seen, config):
    units = Units(np.ones((config.layers, config.heads), np.int8), np.ones((config.layers, config.mlp), np.int8))

    def roles(store, asked, rows, how, done):
        seen.note("units", asked, [data_sha256(each) for each in rows.values()], how)
        return UnitRoles(units, units, InputMoments({}, {}), [plain(how.shares), how.as_coded])

    def read(store, asked, prompts, rows, how, done):
        seen.note("read", asked, prompts, how)
        gap = Gap(*[(0.0,) * config.layers] * 6, (4, 4), how.triples, LayerRange(0, 1))
        return gap, Direction(np.ones(config.embed, np.float32), 0, 0, 0.0, 0.0, 0.15, True)

    def parts(material, weights, ranks, units, direction):
        seen.note("parts", weights, ranks)
        return Parts({}, units, {}, {}, {})

    def agree(config, params, parts, draws, seed, done):
        seen.note("overlaps", draws, seed)
        return ()

    for name, stand_in in (("unit_roles_once", roles), ("read_once", read), ("parts_of", parts), ("overlaps", agree)):
        monkeypatch.setattr(anatomy, name, stand_in)
    monkeypatch.setattr(anatomy, "located", lambda config, parts, layers: ())
    # How sparse a variant is follows from what its key already names.
    monkeypatch.setattr(weight_edits, "removed", lambda material, point: None)


def given(value, pairs):
    return value(pairs) if callable(value) else value


def description(task, seen, out, changes):
    """What the run of a config with `changes` asks for, or the line that refuses it."""
    config = BASES[task].base()
    for name, value in changes.items():
        setattr(config, name, value)
    seen.calls.clear()
    try:
        model = common.load(config, Clock())
        if task in ("scans", "overrefusal", "jailbreak"):
            SCRIPTS[task].run(config, model, SCRIPTS[task].roles_of(config), out, Clock())
        else:
            SCRIPTS[task].run(config, model, out, Clock())
    except (ValueError, FileNotFoundError) as error:
        return f"refused: {error}"
    return json.dumps(seen.calls)


@pytest.mark.parametrize(("task", "field"), FIELDS, ids=[f"{task}-{field}" for task, field in FIELDS])
def test_a_field_changes_the_run(task, field, seen, out, pairs, usuals):
    beside = BESIDE.get((task, field), BESIDE.get(field, {}))
    usual = SMALL | SMALL_BY_TASK[task] | {k: given(v, pairs) for k, v in beside.items()}
    key = (task, repr(usual))
    if key not in usuals:
        usuals[key] = description(task, seen, out / task, usual)
    before = usuals[key]
    changed = BY_TASK.get((task, field), OTHER[field])
    after = description(task, seen, out / task, usual | {field: given(changed, pairs)})
    assert after != before, f"config.{field} of {task} changes nothing"
    needs_more = field in ("data", "suffixes", "poison", "ratio")
    assert needs_more or not before.startswith("refused"), before
