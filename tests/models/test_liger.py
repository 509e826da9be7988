"""Which language models get liger-kernel's layers."""

from types import SimpleNamespace

import pytest

from fastpo.config import Model
from fastpo.models import trainable


def body(kind):
    return SimpleNamespace(config=SimpleNamespace(model_type=kind))


def test_a_body_without_kernels_is_refused_or_runs_without_them(caplog):
    with pytest.raises(ValueError, match="no kernels for gemma, only for llama, mistral, qwen2, qwen3"):
        trainable.apply_liger(body("gemma"), Model(path="", liger="on"), "cuda")
    trainable.apply_liger(body("gemma"), Model(path="", liger="auto"), "cuda")
    assert [r.message for r in caplog.records] == [
        "model.liger: auto: no kernels for a gemma language model, it runs without them"
    ]


def test_the_cpu_has_none(caplog):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        trainable.apply_liger(body("llama"), Model(path="", liger="on"), "cpu")
    trainable.apply_liger(body("llama"), Model(path="", liger="auto"), "cpu")
    assert not caplog.records
