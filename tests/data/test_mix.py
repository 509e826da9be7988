"""SPO's mixing rules and list of files."""

import json

import pytest
import yaml

from fastpo.config import Source
from fastpo.data.mix import Part, mix, parts, repeat, samples
from fastpo.sample import BadSample, Sample

ROWS = list("abcdefg")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("all", "abcdefg"),
        ("first:3", "abc"),
        ("end:3", "efg"),
        ("end:0", ""),
        ("first:99", "abcdefg"),
        ("end:99", "abcdefg"),
        ("first:50%", "abcd"),  # 3.5, rounded up
        ("end:0.5%", "g"),
        ("random:7", "abcdefg"),
        ("100%", "abcdefg"),
    ],
)
def test_rules(rule, expected):
    assert mix(ROWS, rule) == list(expected)


def test_random_rows_are_fixed_by_the_seed_and_in_file_order():
    rows = list(range(1000))
    some = mix(rows, "random:300", 1)
    assert some == mix(rows, "random:30%", 1) == mix(rows, "30%", 1) == sorted(set(some)) and len(some) == 300
    assert some != mix(rows, "random:300", 2) and 400 < sum(some) / 300 < 600


def test_weights_repeat_rows():
    assert repeat(ROWS, 1) == ROWS and repeat(ROWS, 0) == [] and repeat(ROWS, 2) == ROWS + ROWS
    once, part = repeat(ROWS, 1.4, 3)[:7], repeat(ROWS, 1.4, 3)[7:]
    assert once == ROWS and len(part) == 3 and part == sorted(part) == repeat(ROWS, 0.4, 3)


@pytest.mark.parametrize("rule", ["", "some", "first", "first:", "first:-1", "last:3", "3", "first:2.5", "random:x%"])
def test_other_rules_are_refused(rule):
    with pytest.raises(ValueError, match="mixing rule"):
        mix(ROWS, rule)


def test_a_list_of_files(tmp_path):
    path = tmp_path / "mix.yaml"
    entries = [{"json_path": "a.json", "sampling_strategy": "first:10%"}, {"json_path": "b.json", "weight": 0.5}]
    path.write_text(yaml.safe_dump({"datasets": entries}))
    assert parts(path) == [Part("a.json", "first:10%"), Part("b.json", "all", 0.5)]
    assert parts("folder/{a, b}.json") == [Part("folder/a.json"), Part("folder/b.json")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("datasets: []", "expected datasets"),
        ("- a.json", "expected datasets"),
        ("datasets: [{path: a.json}]", r"datasets.0: expected json_path"),
        ("datasets: [{json_path: a.json, rule: all}]", r"datasets.0: unknown key rule"),
        ("datasets: [{json_path: a}, {json_path: b, sampling_strategy: x}]", r"datasets.1: mixing rule 'x'"),
        ("datasets: [{json_path: a, weight: -1}]", r"datasets.0: weight -1"),
        ("datasets: [{json_path: a, weight: heavy}]", r"datasets.0.weight: expected a number"),
        ("datasets: [", "mix.yaml: "),
    ],
)
def test_bad_lists_name_the_file_and_the_entry(tmp_path, text, reason):
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        parts(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="gone.yaml"):
        parts(tmp_path / "gone.yaml")


def write(path, count, bad=()):
    rows = [{"question": f"{path.stem}{i}?", "chosen": "yes", "rejected": "no"} for i in range(count)]
    for i in bad:
        rows[i]["chosen"] = ""
    path.write_text(json.dumps(rows))
    return str(path)


def keys(found):
    return [row.key.rsplit("/", 1)[1] for row in found if isinstance(row, Sample)]


def test_data_sets_are_mixed_and_repeated_rows_have_keys_of_their_own(tmp_path):
    a, b = write(tmp_path / "a.json", 3), write(tmp_path / "b.json", 4, bad=[1])
    found = samples([Source(name="dpo", path=a, weight=2), Source(name="dpo", path=b, rule="first:3")], tmp_path)
    want = ["a.json:0", "a.json:1", "a.json:2", "a.json:0#2", "a.json:1#2", "a.json:2#2", "b.json:0", "b.json:2"]
    assert keys(found) == want
    twice = samples([Source(name="dpo", path=b, weight=2), Source(name="dpo", path=b)], tmp_path)
    assert keys(twice) == [f"b.json:{i}{n}" for n in ("", "#2", "#3") for i in (0, 2, 3)]
    assert sum(isinstance(row, BadSample) for row in twice) == 1
    part = Source(name="dpo", path=a, weight=1.34)
    assert len(samples(part, tmp_path)) == 4
    assert {keys(samples(part, tmp_path, seed))[3] for seed in range(9)} == {f"a.json:{i}#2" for i in range(3)}


def test_a_list_of_files_is_a_data_set(tmp_path):
    a, b = write(tmp_path / "a.json", 3), write(tmp_path / "b.json", 4)
    listed = tmp_path / "mix.yaml"
    entries = [{"json_path": a, "sampling_strategy": "end:1"}, {"json_path": b, "weight": 0.5}]
    listed.write_text(yaml.safe_dump({"datasets": entries}))
    found = keys(samples(Source(name="dpo", path=str(listed), weight=2, rule="first:2"), tmp_path))
    assert found == ["a.json:2", "a.json:2#2", "b.json:0", "b.json:1"]
    braces = Source(name="dpo", path=f"{tmp_path}/{{a,b}}.json")
    assert len(samples(braces, tmp_path)) == 7


def test_a_rule_that_is_none_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: mixing rule 'last:1'"):
        samples(Source(name="dpo", path=write(tmp_path / "a.json", 2), rule="last:1"), tmp_path)
