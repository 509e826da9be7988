"""A reward model and PPO that learns from it, as whole runs on the tiny model."""

import math

import pytest
from safetensors.torch import load_file

from fastpo.config import load
from fastpo.fit import fit, make_policy
from tests.test_fit import options, rows
from tests.test_rollout import answers, config

RM = "configs/rm_llava15.yaml"


@pytest.fixture(scope="module")
def judge(demo, tmp_path_factory):
    """The folder of a short reward-model run on RRPO's pairs, in the recipe's own bfloat16 under ZeRO-3."""
    out = tmp_path_factory.mktemp("judge")
    more = ["model.family=llava_video", f"data.train={{name: rrpo, path: {demo / 'train.json'}}}", "optim.steps=3"]
    fit(load(RM, options(demo, out, *more, "model.dtype=bfloat16", "optim.lr_value=1e-1", "loss.name=reward_pair")))
    return out


def test_a_reward_model_starts_at_log_2_learns_and_saves_its_head(judge):
    found = rows(judge)
    assert found[0]["loss"] == pytest.approx(math.log(2)) and found[0]["accuracy"] == 0.5
    assert found[-1]["loss"] != found[0]["loss"] and found[-1]["margin"] != 0
    (head,) = judge.glob("checkpoints/step_000003/adapter/value_head.safetensors")
    assert load_file(head)["weight"].abs().max() > 0


PPO = [
    "loss={name: ppo, clip: 0.2}",
    "rollout.advantage=gae",
    "rollout.rewards=[]",
    "rollout.group=2",
    "rollout.gae={beta: 0.1, standardise: true, critic_steps: 2}",
    "optim.lr_value=1e-2",
]


def test_ppo_learns_from_a_learned_reward_with_a_critic(judge, demo, tmp_path):
    out = tmp_path / "ppo"
    fit(load(config(demo, out), [*PPO, f"rollout.reward_model={judge}"]))
    found, said = rows(out), answers(out)
    assert len(found) == 4 and all(math.isfinite(row["loss"]) for row in found)
    assert said[0]["reward"] == pytest.approx(said[0]["parts"]["model"]) and len({row["reward"] for row in said}) > 1
    assert found[0]["value_loss"] > 0, "a critic that starts at 0 is wrong"
    assert found[1]["value_loss"] < found[0]["value_loss"], "the second update is on the same rollout"
    assert found[0]["clip_high"] == found[0]["clip_low"] == 0 and found[0]["kl"] == pytest.approx(0, abs=1e-6)
    scaled = ["rollout.gae.reward_scale=3", "optim.steps=2"]
    fit(load(config(demo, tmp_path / "scaled"), [*PPO, f"rollout.reward_model={judge}", *scaled]))
    assert rows(tmp_path / "scaled")[0]["value_loss"] == pytest.approx(9 * found[0]["value_loss"], rel=1e-3)


def test_what_is_no_reward_model_is_refused(demo, tmp_path):
    with pytest.raises(ValueError, match="is no reward model"):
        fit(load(config(demo, tmp_path / "ppo"), [*PPO, f"rollout.reward_model={tmp_path}"]))


def test_the_critic_starts_from_the_reward_models_head_where_asked(judge, demo, tmp_path):
    asked = [*PPO, "rollout.gae.critic_head=reward_model"]
    run = load(config(demo, tmp_path), [*asked, f"rollout.reward_model={judge}"])
    policy = make_policy(run, frozenset({"logp", "value"}), "cpu")
    (head,) = judge.glob("checkpoints/step_000003/adapter/value_head.safetensors")
    assert policy.value_head is not None
    assert policy.value_head.weight.equal(load_file(head)["weight"].to(policy.value_head.weight.dtype))
    with pytest.raises(ValueError, match="critic_head: reward_model needs rollout.reward_model"):
        load(config(demo, tmp_path), [*asked, "rollout.rewards=[{name: classification}]"])
