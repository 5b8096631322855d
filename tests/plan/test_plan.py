"""The plan: operations against the compiler's count, collectives counted by hand, memory that a compiled run has."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import tiny_config

from jaxsafe.devices import CHIPS, chip, chip_of
from jaxsafe.model.families import config_to_hf
from jaxsafe.model.presets import preset
from jaxsafe.model.transformer import forward
from jaxsafe.parallel import default_mesh, make_mesh, mesh_lengths, parse_mesh, undivided
from jaxsafe.plan.collectives import collectives, sent
from jaxsafe.plan.costs import decomposition_flops, flops
from jaxsafe.plan.plan import in_turns, meshes, outline, plan, smallest, training, ways
from jaxsafe.plan.tasks import TASKS, Work, device_bytes, parameters
from launch.plan import as_json, model_config, verdict

ROOT = pathlib.Path(__file__).parents[2]
WIDE = tiny_config(embed=64, mlp=128, head_dim=16, vocab=304, context=256)
WORK = Work(batch=8, length=32, new_tokens=8, samples=16, sample_batch=8)


def one_device():
    return make_mesh({"data": 1, "model": 1}, jax.devices()[:1])


# Operations


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 4}, {"tied": True, "mlp": 96}])
def test_operations_of_one_layer_are_those_that_the_compiler_counts(changes):
    config = dataclasses.replace(WIDE, layers=1, **changes)
    tokens = jax.ShapeDtypeStruct((4, 48), jnp.int32), jax.ShapeDtypeStruct((4, 48), bool)
    lowered = jax.jit(forward, static_argnums=0).lower(config, parameters(config, one_device()), *tokens)
    counted = lowered.compile().cost_analysis()["flops"]
    # The compiler counts norms, softmax and rotation as well, a few in a hundred at this size.
    assert 1 < counted / flops(config, one_device(), 4, 48, 48, 4 * 48) < 1.12


def test_operations_grow_with_layers_tokens_and_context_by_themselves():
    def of(layers=3, rows=2, queries=16, keys=16, **changes):
        config = dataclasses.replace(WIDE, layers=layers, **changes)
        return flops(config, one_device(), rows, queries, keys, 0)

    assert of(layers=6) == 2 * of(layers=3)
    assert of(rows=6) == 3 * of(rows=2)
    heads = WIDE.heads * WIDE.head_dim
    assert of(keys=32) - of(keys=16) == 3 * 2 * 16 * 16 * 4 * heads
    assert of(keys=32, window=16) == of(keys=16)


def test_devices_share_operations_and_what_does_not_divide_is_done_by_all():
    mesh = parse_mesh("data:2,model:4")
    config = dataclasses.replace(WIDE, kv_heads=4)
    assert flops(config, mesh, 8, 16, 16, 8) == flops(config, one_device(), 8, 16, 16, 8) / 8
    odd = dataclasses.replace(config, vocab=303)
    whole = 2 * 8 * odd.embed * odd.vocab
    assert flops(odd, mesh, 8, 16, 16, 8) == flops(odd, mesh, 8, 16, 16, 0) + whole / 2


def test_a_square_map_is_decomposed_in_two_products_and_its_eigenvectors():
    assert decomposition_flops(10, 10) == 4 * 10**3 + 9 * 10**3
    assert decomposition_flops(10, 20) > decomposition_flops(20, 10)


# Collectives


def test_a_loop_of_collectives_is_counted_as_often_as_it_turns():
    mesh = parse_mesh("data:2,model:4")

    def local(x):
        def turn(_, y):
            return jax.lax.psum(y, "model") / 4

        looped = jax.lax.fori_loop(0, 5, turn, x)
        gathered = jax.lax.all_gather(looped, "data")
        return jax.lax.while_loop(lambda y: jnp.max(y) > 1, lambda y: turn(0, y) - 1, gathered.sum(0))

    spec = PartitionSpec("data", "model")
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = mapped.lower(x).compile().as_text()
    share = 16 * 16 * 4  # bytes of a device's part
    by_kind = {c.kind: c for c in collectives(text, turn=False)}
    assert by_kind["all-reduce"].count == 5
    assert by_kind["all-reduce"].bytes == 5 * 2 * 3 / 4 * share
    assert by_kind["all-gather"].count == 1 and by_kind["all-gather"].bytes == share
    (inside,) = collectives(text, turn=True)
    assert (inside.kind, inside.count, inside.bytes) == ("all-reduce", 1, 2 * 3 / 4 * share)
    assert {c.kind: c.count for c in collectives(text)} == {"all-reduce": 6, "all-gather": 1}


def test_what_a_ring_sends():
    assert sent("all-gather", 800, 8) == 700  # all but its own part
    assert sent("reduce-scatter", 100, 8) == 700
    assert sent("all-reduce", 800, 8) == 1400
    assert sent("collective-permute", 800, 8) == 800
    assert sent("all-to-all", 800, 8) == 700


# Plans


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mesh", ["data:8", "data:2,model:4"])
def test_every_task_has_a_plan(task, mesh):
    found = plan(WIDE, parse_mesh(mesh), task, WORK)
    assert all(step.flops > 0 and step.moved > 0 and step.temporaries > 0 for step in found.steps)
    assert all(any(c.bytes > 0 for c in step.collectives) for step in found.steps if step.name != "decompositions")
    assert found.memory >= max(sum(step.groups.values()) for step in found.steps)
    assert 0 < found.seconds(chip("v5p")) < found.seconds(chip("v5e"))
    rough = outline(WIDE, parse_mesh(mesh), task, WORK)
    for step, known in zip(rough.steps, found.steps, strict=True):
        assert (step.groups, step.flops, step.moved) == (known.groups, known.flops, known.moved)
        assert (step.temporaries, step.collectives) == (0, ())
    assert 0 < rough.seconds(chip("v5e")) <= found.seconds(chip("v5e")) and rough.memory < found.memory


def test_what_the_compiler_of_a_chip_refuses_does_not_fit(monkeypatch):
    mesh, device = parse_mesh("data:2,model:4"), chip("v5e")

    def refusing(message, *task):
        def compiled():
            raise jax.errors.JaxRuntimeError(message)

        own = task[1].devices.flat[0] is jax.devices()[7]
        return tuple(dataclasses.replace(p, compile=compiled) if own else p for p in TASKS["snip"](*task))

    described = jax.devices()[::-1]
    monkeypatch.setitem(TASKS, "refused", functools.partial(refusing, "RESOURCE_EXHAUSTED: Ran out of memory"))
    found = plan(WIDE, mesh, "refused", WORK, described)
    assert not found.fits(device) and found.memory == math.inf
    line = json.loads(as_json(found, device))
    assert line["memory"] is None and line["steps"][0]["temporaries"] is None and line["seconds"] > 0
    assert verdict(found, device, WIDE, WORK, jax.devices()).startswith(
        "refused does not fit: needs more than all of 16 GB; "
    )
    monkeypatch.setitem(TASKS, "refused", functools.partial(refusing, "INTERNAL: broken"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        plan(WIDE, mesh, "refused", WORK, described)


def test_a_model_in_bfloat16_holds_and_sends_half():
    mesh = parse_mesh("data:2,model:4")
    whole, half = (plan(dataclasses.replace(WIDE, dtype=t), mesh, "generation", WORK) for t in ("float32", "bfloat16"))
    for one, other in zip(whole.steps, half.steps, strict=True):
        assert other.groups == {name: size / 2 for name, size in one.groups.items()}
        assert [c.bytes for c in other.collectives] == [c.bytes / 2 for c in one.collectives]
        assert other.temporaries == one.temporaries


def test_groups_are_the_bytes_that_arrays_take():
    mesh = parse_mesh("data:2,model:4")
    config = dataclasses.replace(WIDE, kv_heads=4)
    (training,) = plan(config, mesh, "fine_tuning", WORK).steps
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(parameters(config, mesh)))
    # Norms of the blocks are split over `data` alone.
    assert count * 4 / 8 <= training.groups["parameters"] <= 1.05 * count * 4 / 8
    assert training.groups["optimiser state"] == pytest.approx(2 * training.groups["parameters"], abs=16)
    real = jax.device_put(np.ones((16, 8), np.float32), NamedSharding(mesh, PartitionSpec("data", "model")))
    assert device_bytes(real) == real.addressable_shards[0].data.nbytes


def test_sums_are_split_over_the_model_axis():
    config = dataclasses.replace(WIDE, kv_heads=4)
    for task in ("snip", "act_svd"):
        one, four = (plan(config, parse_mesh(m, jax.devices()[:n]), task, WORK) for m, n in (("", 1), ("model:4", 4)))
        assert four.steps[0].groups["sums"] == one.steps[0].groups["sums"] / 4


def test_rows_that_do_not_divide_and_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="batch of 6 rows does not divide over 8 devices"):
        plan(WIDE, parse_mesh("data:8"), "generation", dataclasses.replace(WORK, batch=6))
    with pytest.raises(ValueError, match="'training' is not known; use one of generation"):
        plan(WIDE, parse_mesh("data:8"), "training", WORK)


def test_the_smallest_mesh_that_fits_is_found():
    assert list(meshes(WIDE, 8, 8))[:2] == [{"data": 1, "model": 1}, {"data": 1, "model": 2}]
    whole = plan(WIDE, one_device(), "generation", WORK).memory
    small = dataclasses.replace(chip("v5e"), memory=0.9 * whole)
    found = smallest(WIDE, small, "generation", WORK, jax.devices())
    assert found.devices > 1 and found.memory <= small.memory
    assert smallest(WIDE, dataclasses.replace(small, memory=10.0), "generation", WORK, jax.devices()) is None


@pytest.mark.parametrize("task", ["snip", "act_svd"])
def test_layers_in_turns_take_less_memory_and_more_passes(task):
    mesh, config = parse_mesh("data:2,model:4"), dataclasses.replace(WIDE, layers=4)
    all_layers, one = (outline(config, mesh, task, dataclasses.replace(WORK, layers=n)) for n in (4, 1))
    whole = outline(config, mesh, task, WORK)
    assert (whole.passes, all_layers.passes, one.passes) == (1, 1, 4) and one.work.layers == 1
    assert one.steps[0].groups["sums"] == whole.steps[0].groups["sums"] / 4
    assert [step.runs for step in one.steps] == [4 * step.runs for step in whole.steps]
    between = dataclasses.replace(chip("v5e"), memory=(one.memory + whole.memory) / 2 / 0.9)
    rough = in_turns(config, dataclasses.replace(between, memory=1e9), task, WORK, mesh)
    assert (rough.work.layers, rough.passes) == (2, 2) and rough.memory > outline(config, mesh, task, WORK).steps[
        0
    ].memory / 2
    assert in_turns(config, dataclasses.replace(between, memory=10.0), task, WORK, mesh) is None
    assert in_turns(config, chip("v5e"), "generation", WORK, mesh) is None


def test_operations_of_a_pass_in_turns_are_those_of_the_blocks_that_it_runs():
    """Against a sum over passes, block by block: forward 1, computed again 1, gradient of inputs 1, products 1."""
    config, work = dataclasses.replace(WIDE, layers=4), dataclasses.replace(WORK, layers=2)
    block = flops(dataclasses.replace(config, layers=1), one_device(), 8, 32, 32, 0)
    head = 3 * 2 * 17 * 8 * config.embed * config.vocab
    (step,) = outline(config, one_device(), "snip", work).steps
    passes = [4 + 2 * behind + 3 * 2 for behind in (2, 0)]
    assert step.runs * step.flops == pytest.approx(2 * sum(n * block + head for n in passes))


@pytest.mark.slow
def test_training_takes_the_fastest_way_that_fits():
    mesh, work = parse_mesh("data:2", jax.devices()[:2]), dataclasses.replace(WORK, length=64, sample_batch=4)
    found = [plan(WIDE, mesh, "fine_tuning", way) for way in ways(work, 2)]
    assert [(each.work.remat, each.work.parts) for each in found] == [(False, 1), (True, 1), (True, 2)]
    kept, again, parts = (each.steps[0] for each in found)
    assert again.flops / kept.flops == 4 / 3 and parts.flops == again.flops
    assert kept.memory > again.memory > parts.memory
    device = dataclasses.replace(chip("v5e"), memory=again.memory / 0.9)
    assert training(WIDE, mesh, "fine_tuning", work, device).work == found[1].work
    assert training(WIDE, mesh, "fine_tuning", work, dataclasses.replace(device, memory=10.0)).work == found[-1].work


def test_more_devices_than_samples_take_one_each():
    odd = dataclasses.replace(WIDE, heads=6, kv_heads=2)
    assert list(meshes(odd, 8, 2))[-1] == {"data": 2, "model": 2}
    assert list(meshes(odd, 8, 2, wider=True))[-2:] == [{"data": 2, "model": 2}, {"data": 4, "model": 2}]
    few = dataclasses.replace(WORK, sample_batch=2)
    least = outline(odd, parse_mesh("data:4,model:2"), "fine_tuning", dataclasses.replace(few, sample_batch=4))
    device = dataclasses.replace(chip("v5e"), memory=1.0)
    whole = plan(odd, parse_mesh("data:4,model:2"), "fine_tuning", dataclasses.replace(few, sample_batch=4)).memory
    assert least.memory < whole
    found = smallest(odd, dataclasses.replace(device, memory=1.01 * whole / 0.9), "fine_tuning", few, jax.devices())
    assert (found.mesh, found.work.sample_batch) == ({"data": 4, "model": 2}, 4)


def test_peaks_of_chips():
    assert chip("V5E") is CHIPS["v5e"]
    assert chip_of("TPU v5 lite").name == "v5e" and chip_of("TPU v5").name == "v5p" and chip_of("TPU v5p").name == "v5p"
    assert chip_of("NVIDIA H100 80GB HBM3").name == "h100" and chip_of("cpu") is None
    with pytest.raises(ValueError, match="'v9' is not known; use one of v4, v5e"):
        chip("v9")


# The default mesh


@pytest.mark.parametrize(
    ("gigabytes", "lengths"), [(None, (8, 1)), (80, (8, 1)), (32, (8, 1)), (16, (4, 2)), (8, (2, 4)), (2.5, (1, 8))]
)
def test_the_model_axis_is_as_short_as_memory_allows(gigabytes, lengths):
    # 16 GB of weights, and 4.3 GB of cache for 32,768 tokens.
    memory = None if gigabytes is None else gigabytes * 1e9
    mesh = default_mesh(preset("llama3.1-8b"), jax.devices(), memory)
    assert tuple(mesh.shape.values()) == lengths
    assert default_mesh(WIDE, jax.devices()[:1], memory) is None


def test_devices_that_cannot_hold_the_weights_are_refused_with_the_sizes():
    with pytest.raises(ValueError, match=r"bfloat16 take 16\.1 GB; 8 devices of 1 GB hold 8 GB"):
        default_mesh(preset("llama3.1-8b"), jax.devices(), 1e9)


def test_axes_that_do_not_divide_are_named():
    assert undivided(WIDE, parse_mesh("data:2,model:4")) == ("kv_heads 2 by model 4",)
    assert undivided(WIDE, parse_mesh("data:4,model:2")) == ()


def test_lengths_of_a_mesh_need_no_devices():
    assert mesh_lengths("model:4") == {"data": 1, "model": 4}
    assert mesh_lengths("data:-1,model:4") == {"data": -1, "model": 4}


# The command


@pytest.mark.parametrize(
    ("config", "name", "dtype"),
    [
        ("scans/llama2_13b_chat", "llama2-13b", "bfloat16"),
        ("brittleness/llama31_8b_instruct", "llama3.1-8b", "bfloat16"),
        ("scans/mistral_7b_instruct", "mistral-7b-v0.2", "bfloat16"),
        ("scans/smollm2_135m", "smollm2-135m", "bfloat16"),
    ],
)
def test_a_launch_configuration_names_a_preset(config, name, dtype):
    found = model_config("", str(ROOT / "configs" / f"{config}.py"))
    assert found == dataclasses.replace(preset(name), dtype=dtype)


def test_a_configuration_file_is_read_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(WIDE)))
    for path in (tmp_path, tmp_path / "config.json"):
        assert model_config("", str(path)) == dataclasses.replace(WIDE, dtype="bfloat16")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config_to_hf(dataclasses.replace(WIDE, layers=9))))
    assert model_config("", str(other)).layers == 9
    for missing in ("nope.json", "nope.py"):
        with pytest.raises(FileNotFoundError, match=f"{missing}: no such file"):
            model_config("", str(tmp_path / missing))
    with pytest.raises(ValueError, match="give --model"):
        model_config("llama2-7b", str(tmp_path))


def launched(*arguments, cwd=ROOT):
    variables = os.environ | {"JAX_COMPILATION_CACHE_DIR": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.plan", *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_the_command_prints_a_verdict_and_what_would_fit(tmp_path):
    done = launched("--model=llama2-7b", "--mesh=data:1,model:1", "--device=v5e", "--task=generation")
    assert done.returncode == 0, done.stderr
    assert "does not fit: needs" in done.stdout and "--mesh=data:1,model:" in done.stdout
    done = launched("--model=smollm2-135m", "--mesh=data:2,model:1", "--device=h100", "--task=snip", "--json")
    line = json.loads(done.stdout)
    assert line["fits"] and line["mesh"] == {"data": 2, "model": 1} and line["device"] == "h100"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=llama-2"], "no preset"),
        ([], "give --model"),
        (["--model=llama2-7b", "--device=v9"], "v9"),
        (["--model=llama2-7b", "--mesh=data:-1"], "give every length"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said):
    done = launched(*arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
