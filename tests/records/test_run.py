"""Records are read as they were written, and what is none is refused by one line."""

import dataclasses
import json
import math
import pathlib

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsafe.records import run as records
from jaxsafe.records.run import (
    SCHEMA,
    Rate,
    Sample,
    Variant,
    from_json,
    json_schema,
    plain,
    read_run,
    read_samples,
    to_json,
    written,
)


@pytest.mark.parametrize("task", runs.RUNS)
def test_a_run_is_read_as_it_was_written(task, tmp_path):
    run, samples = runs.RUNS[task](), runs.SAMPLES[task]()
    runs.save(tmp_path, run, samples)
    assert read_run(tmp_path) == run
    assert read_samples(tmp_path) == samples
    with pytest.raises(KeyError):
        run.row("no such group")
    assert all(run.row(row.group) is row for row in run.table)


texts = st.text(st.characters(exclude_categories=()))
samples = st.builds(
    Sample,
    *[texts] * 3,
    st.sampled_from([True, False, None]),
    *[texts] * 3,
    st.sampled_from([True, False, None]),
    st.none() | st.integers(0, 9),
    st.integers(0, 9),
    st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([True, False, None]),
)


def encodable(text):
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@settings(deadline=None)
@given(st.lists(samples, max_size=4))
def test_samples_of_any_text_are_read_as_they_were_written(tmp_path_factory, those):
    folder = tmp_path_factory.mktemp("samples")
    (folder / "samples.jsonl").write_text(written(those), encoding="utf-8")
    fields = [{k: encodable(v) if isinstance(v, str) else v for k, v in vars(s).items()} for s in those]
    assert read_samples(folder) == [Sample(**each) for each in fields]


def test_a_lone_surrogate_is_written_as_the_replacement_character():
    sample = runs.sample("v", "a\ud800b \udc00", prompt="whole: \U0001f600, halves: \ud83d\ude00")
    line = json.loads(to_json(sample))
    assert line["text"] == "a\ufffdb \ufffd" and line["prompt"] == "whole: \U0001f600, halves: \U0001f600"
    assert plain({"\udfff": [sample, math.nan, np.arange(2)]}) == {"\ufffd": [line, None, [0, 1]]}
    assert written([sample, sample]) == 2 * (to_json(sample) + "\n")


def test_plain_values_are_json():
    value = {
        "float": np.float32(0.5),
        "nan": math.nan,
        3: [math.inf, jnp.float32(-jnp.inf), 1.5],
        "array": np.array([[1, 2], [3, 4]]),
        "device": jnp.array([0.25, jnp.nan]),
        "flags": (np.bool_(True), None, False),
        "nested": {"text": "über", "tuple": ((1, 3),)},
        "record": Rate(0.5, None, None, 2),
    }
    found = plain(value)
    assert found == {
        "float": 0.5,
        "nan": None,
        "3": [None, None, 1.5],
        "array": [[1, 2], [3, 4]],
        "device": [0.25, None],
        "flags": [True, None, False],
        "nested": {"text": "über", "tuple": [[1, 3]]},
        "record": {"value": 0.5, "ci_low": None, "ci_high": None, "n": 2, "n_unscored": 0},
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    with pytest.raises(TypeError, match="object is no value of JSON"):
        plain({"x": object()})


def test_json_is_one_line_unless_it_is_indented():
    rate = Rate(math.nan, 0.25, math.inf, 3)
    assert to_json(rate) == '{"value":null,"ci_low":0.25,"ci_high":null,"n":3,"n_unscored":0}'
    assert to_json(rate, indent=1).split("\n")[1] == ' "value": null,'
    assert json.loads(to_json(rate, indent=1)) == json.loads(to_json(rate))


def test_details_are_converted_or_refused():
    rate = Rate(0.5, 0.1, 0.9, 4, 1)
    assert from_json(plain(rate), Rate) == rate
    with pytest.raises(ValueError, match=r"these details are no Rate: Expected `int`, got `str` - at `[$].n`"):
        from_json(plain(rate) | {"n": "4"}, Rate)


def test_a_variant_without_a_group_is_its_own():
    assert Variant("a").of == "a" and Variant("a, seed 0", group="a").of == "a"


@pytest.mark.parametrize("schema", [2, 4, None, "3"])
def test_another_schema_is_refused_by_one_line(schema, tmp_path):
    content = json.loads(to_json(runs.scans_run())) | {"schema": schema}
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"run.json has schema {schema!r}; this version reads schema 3: run it anew$"):
        read_run(tmp_path)


def test_a_run_of_before_there_were_schemas_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"task": "scans", "metrics": {}}')
    with pytest.raises(ValueError, match=r"run.json has schema None; this version reads schema 3: run it anew$"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-9], "truncated"),
        (lambda text: "[1]", "Expected `object`, got `array`"),
        (lambda text: "", "truncated"),
        (lambda text: text.replace('"seed":0', '"seed":"0"'), "Expected `int`, got `str` - at `[$].seed`"),
        (lambda text: text.replace('"seed":0,', ""), "missing required field `seed`"),
        (lambda text: text.replace('"n_unscored":0', '"n_unscored":0.5'), r"Expected `int`, got `float`"),
    ],
)
def test_what_is_no_run_is_refused_by_one_line(change, message, tmp_path):
    (tmp_path / "run.json").write_text(change(to_json(runs.scans_run())))
    with pytest.raises(ValueError, match=rf"run.json is no run: .*{message}") as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run.json is missing; give the folder of a finished run"):
        read_run(tmp_path)
    assert read_samples(tmp_path) == []


def test_a_bad_sample_is_named_by_its_line(tmp_path):
    good = written([runs.sample("v")])
    for bad in ('{"variant": "v"}', good.strip()[:-5], "7"):
        (tmp_path / "samples.jsonl").write_text(f"{good}\n{bad}\n{good}")
        with pytest.raises(ValueError, match=r"samples.jsonl, line 3, is no sample: ") as error:
            read_samples(tmp_path)
        assert "\n" not in str(error.value)


def test_the_schema_that_comes_along_is_current():
    shipped = pathlib.Path(records.__file__).with_name("schema.json")
    made = json.dumps(json_schema(), indent=1) + "\n"
    assert shipped.read_text() == made, "write json.dumps(json_schema(), indent=1) to jaxsafe/records/schema.json"


def test_the_schema_names_every_field():
    for name, kind in (("run", records.Run), ("sample", Sample)):
        defined = json_schema()[name]["$defs"]
        properties = {each: set(found["properties"]) for each, found in defined.items() if "properties" in found}
        for each in properties:
            fields = dataclasses.fields(getattr(records, each))
            assert properties[each] == {field.name for field in fields}, each
        assert kind.__name__ in properties
    assert msgspec.json.decode(to_json(runs.scans_run()))["schema"] == SCHEMA
