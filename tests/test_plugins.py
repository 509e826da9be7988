"""resolve: which function, which options, and what it says when they are wrong."""

import json
import subprocess
import sys
from typing import Annotated, Literal

import pytest
from pydantic import Field

from fastpo.config import Plugin, Source
from fastpo.plugins import resolve


def mean(a, b, *, beta: float = 0.1, variant: Literal["paper", "released"] = "paper", rows: tuple[int, ...] = ()):
    return a + b, beta, variant, rows


def strict(*, share: "Annotated[float, Field(ge=0, le=1)]", free=None):
    return share, free


TABLE = {"mean": mean, "strict": strict}


def plugin(name: str, **options) -> Plugin:
    return Plugin.model_validate({"name": name, **options})


def test_options_are_bound_and_defaults_stay():
    assert resolve(TABLE, plugin("mean"))(1, 2) == (3, 0.1, "paper", ())
    assert resolve(TABLE, plugin("mean", variant="released", rows=[1, 2]))(1, 2) == (3, 0.1, "released", (1, 2))


@pytest.mark.parametrize("written, value", [("5e-7", 5e-7), (1, 1.0), (0.25, 0.25)])
def test_values_become_the_annotated_type(written, value):
    beta = resolve(TABLE, plugin("mean", beta=written)).keywords["beta"]
    assert beta == value and type(beta) is float


def test_unannotated_option_is_passed_as_it_is():
    assert resolve(TABLE, plugin("strict", share=1, free=[1, "x"]))() == (1.0, [1, "x"])


def test_declared_keys_are_not_options():
    source = Source.model_validate({"name": "mean", "path": "rows.json", "beta": 1})
    assert resolve(TABLE, source).keywords == {"beta": 1.0}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"betta": 1}, ["loss.betta: unknown option", "mean takes beta, rows, variant"]),
        ({"a": 1}, ["loss.a: unknown option"]),
        ({"beta": "x"}, ["loss.beta:", "number", "'x'"]),
        ({"beta": [1]}, ["loss.beta:", "[1]"]),
        ({"variant": "ours"}, ["loss.variant:", "'paper' or 'released'", "'ours'"]),
        ({"betta": 1, "beta": "x"}, ["loss.betta", "loss.beta:"]),
    ],
)
def test_wrong_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError) as error:
        resolve(TABLE, plugin("mean", **options), key="loss")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "options, words", [({}, "share: missing option"), ({"share": 1.5}, "share: .*less than or equal")]
)
def test_required_and_ranged_options(options, words):
    with pytest.raises(ValueError, match=words):
        resolve(TABLE, plugin("strict", **options))


def test_function_by_import_path():
    assert resolve({}, plugin("textwrap:shorten"))("a b", 9) == "a b"


@pytest.mark.parametrize(
    "name, words",
    [
        ("meen", "loss.name: unknown 'meen', expected one of mean, strict or package.module:function"),
        ("no_such_module:f", "loss.name: cannot import 'no_such_module:f': No module named 'no_such_module'"),
        ("json:f", "loss.name: cannot import 'json:f': module 'json' has no attribute 'f'"),
        (":f", "loss.name: cannot import ':f'"),
    ],
)
def test_unknown_function(name, words):
    with pytest.raises(ValueError) as error:
        resolve(TABLE, plugin(name), key="loss")
    assert str(error.value).startswith(words)


def test_config_and_plugins_import_no_torch():
    code = "import json, sys, fastpo.config, fastpo.plugins; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert "fastpo.plugins" in modules
    assert not {"torch", "transformers", "deepspeed", "fastpo_kernels"} & set(modules)
