"""The published recipes: every name in them exists, and takes the options that they give it."""

from pathlib import Path

import pytest

from fastpo import rewards
from fastpo.config import load
from fastpo.data.formats import DATASETS
from fastpo.fit import check_rollout
from fastpo.models import FAMILIES
from fastpo.plugins import resolve
from fastpo_kernels import losses

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_names_what_exists(path):
    run = load(path)
    loss = resolve(losses.LOSSES, run.loss, key="loss")
    for source in [run.data.train] if not isinstance(run.data.train, tuple) else run.data.train:
        resolve(DATASETS, source, key="data.train")
    check_rollout(run, losses.needs(loss))
    if run.rollout:
        rewards.terms(run.rollout.rewards)
    assert run.model.family in FAMILIES
    if run.reference.mode == "none":
        assert not losses.needs(loss) & {"ref_logp", "kl"}


def test_every_system_has_a_recipe():
    stems = " ".join(path.stem for path in CONFIGS)
    for name in ("rrpo", "perpo", "spo_sft", "spo_llavaov", "grpo_visualrft", "miadpo", "sft_", "rm_", "ppo_", "dpo_"):
        assert name in stems
