"""Whole GRPO runs on the tiny model: ranks, resuming, several updates on one rollout, what is refused."""

import json
import threading
from pathlib import Path

import pytest
import torch

from fastpo import rollout, train
from fastpo.config import load
from fastpo.fit import fit, make_feed
from fastpo.models import chat
from fastpo.sample import Response, Sample
from tests.test_fit import adapter, rows

CONFIG = """
out: {out}
save_every: 2
model: {{path: {demo}/model, dtype: float32, lora: {{r: 4, alpha: 8}}, gradient_checkpointing: false}}
data: {{train: {{name: rollout, path: {prompts}}}, media_root: {demo}, frames: 2, workers: 0}}
batch: {{prompts: 3, tokens: 1024}}
loss: {{name: grpo, beta: 0.1}}
rollout:
  {{group: 4, updates: 2, generation: {{max_tokens: 5}}, rewards: [{{name: "tests.test_rollout:vowels", weight: 2}}]}}
optim: {{lr: 1e-2, steps: 4, warmup: 0}}
log: {{tensorboard: false}}
"""


def vowels(answer: str, truth: str) -> float:
    """Share of vowels: something that a random model's answers differ in."""
    return sum(letter in "aeiou" for letter in answer) / max(1, len(answer))


def config(demo: Path, out: Path) -> Path:
    table = json.loads((demo / "train.json").read_text())[:7]
    prompts = [
        {"video": row["media_path"], "prompt": row["question"].replace("<image>", "<video>"), "truth": row["answer"]}
        for row in table
    ]
    file = out.parent / "prompts.json"  # the name is part of a sample's key, and so of its random numbers
    file.write_text(json.dumps(prompts))
    text = CONFIG.format(demo=demo, out=out, prompts=file)
    file = out.with_suffix(".yaml")
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def base(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("rollout") / "base"
    fit(load(config(demo, out)))
    return out


def answers(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]


def test_answers_rewards_and_metrics_are_written(base):
    found = answers(base)
    assert [row["step"] for row in found] == [0] * 12 + [2] * 12
    for row in found:
        assert (
            row["reward"]
            == pytest.approx(2 * vowels(row["answer"], ""))
            == 2 * row["parts"]["tests.test_rollout:vowels"]
        )
    steps = rows(base)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    first = [row["reward"] for row in found[:12]]
    assert steps[0]["reward"] == pytest.approx(sum(first) / 12)
    assert steps[0]["loss"] == pytest.approx(0, abs=1e-6), "advantages of a group add up to 0 where the ratio is 1"
    assert steps[0]["clip_high"] == steps[0]["clip_low"] == 0 and abs(steps[1]["loss"]) > 1e-4


def test_two_ranks_equal_one(base, demo, tmp_path, two_ranks):
    out = tmp_path / "two"
    two_ranks(str(config(demo, out)))
    key = lambda row: (row["step"], Path(row["key"]).name)  # noqa: E731
    mine = [(*key(row), row["answer"], row["reward"]) for row in sorted(answers(base), key=key)]
    theirs = [(*key(row), row["answer"], row["reward"]) for row in sorted(answers(out), key=key)]
    assert mine == theirs
    for a, b in zip(rows(base), rows(out), strict=True):
        for name in ("loss", "reward", "grad_norm", "kl"):
            assert b[name] == pytest.approx(a[name], rel=2e-5, abs=1e-6)


def test_stopped_and_restarted_equals_uninterrupted(base, demo, tmp_path):
    """Stopped at once: it saves after the rollout's second update, since the updates in between cannot be resumed."""
    out = tmp_path / "again"
    stop = threading.Event()
    stop.set()
    run = load(config(demo, out))
    with pytest.raises(SystemExit):
        fit(run, stop)
    assert [row["step"] for row in rows(out)] == [1, 2]
    fit(run)
    assert [(row["step"], row["loss"], row["reward"]) for row in rows(out)] == [
        (row["step"], row["loss"], row["reward"]) for row in rows(base)
    ]
    assert [row["answer"] for row in answers(out)] == [row["answer"] for row in answers(base)]
    mine, theirs = adapter(out), adapter(base)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout=null", "add a rollout section"),
        ("loss={name: dpo}", "not sampled ones"),
        ("rollout.group=300", "batch.tokens: 1024 holds no group"),
        ("rollout.rewards=[{name: vowel}]", "rollout.rewards.0"),
        ("reference.mode=cache", "cache"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(demo, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        fit(load(config(demo, tmp_path / "out"), [override]))


def raises(answer: str, truth: str) -> float:
    raise KeyError("color")


def test_a_reward_that_raises_names_the_row_and_stops(demo, tmp_path):
    with pytest.raises(ValueError, match=r"row \d, key truth: reward tests.test_rollout:raises: 'color'"):
        fit(load(config(demo, tmp_path / "out"), ['rollout.rewards=[{name: "tests.test_rollout:raises"}]']))


def test_a_truth_that_cannot_be_read_stops_before_the_model_is_loaded(demo, tmp_path):
    run = load(config(demo, tmp_path / "out"), ["rollout.rewards=[{name: numeric}]"])
    table = make_feed(run, 0, 1).read(run.data.train, keep="none")
    with pytest.raises(ValueError, match=r"row 0, key truth: reward numeric: the ground truth is not a number"):
        rollout.readable(run, table)
    skipping = run.model_copy(update={"data": run.data.model_copy(update={"on_bad_sample": "skip"})})
    with pytest.raises(ValueError, match=r"no usable row; the first of \d+ bad ones: .*row 0, key truth"):
        rollout.readable(skipping, table)


def test_rows_with_a_truth_that_cannot_be_read_are_skipped_and_counted_where_asked(demo, tmp_path, capsys):
    file = config(demo, tmp_path / "out")
    table = json.loads((tmp_path / "prompts.json").read_text())
    for n, row in enumerate(table):
        row["truth"] = "many" if n == 1 else n
    (tmp_path / "prompts.json").write_text(json.dumps(table))
    rewards = ["rollout.rewards=[{name: numeric}]", "data.on_bad_sample=skip"]
    run = load(file, rewards)
    found = rollout.readable(run, make_feed(run, 0, 1).read(run.data.train, keep="none"))
    assert len(found) == len(table) - 1 == len(found.encoded) and found.samples[1].truth == 2
    ((key, reason),) = found.skipped
    assert key.endswith("prompts.json:1") and "row 1, key truth: reward numeric: the ground truth is not" in reason
    train.main([str(file), *rewards, "--dry-run"])
    assert "(1 skipped)" in capsys.readouterr().out


def test_a_clip_that_cannot_be_decoded_is_left_out_and_listed(demo, tmp_path):
    file = config(demo, tmp_path / "out")
    table = json.loads((tmp_path / "prompts.json").read_text())
    whole = (demo / table[2]["video"]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    rows_of = [{**row, "video": str(demo / row["video"])} for row in table]
    (tmp_path / "prompts.json").write_text(json.dumps([*rows_of[:2], {**table[2], "video": str(tmp_path / "cut.mp4")}]))
    fit(load(file, ["data.on_bad_sample=skip", "optim.steps=2", "data.media_root=/"]))
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in skipped] == [f"{tmp_path / 'prompts.json'}:2"] and "cut.mp4" in skipped[0]["reason"]
    assert {row["key"][-2:] for row in answers(tmp_path / "out")} == {":0", ":1"}


def test_groups_without_signal_are_dropped():
    assert rollout.has_signal((0.0, 1.0)) and not rollout.has_signal((0.5, 0.5, 0.5))


def test_a_learned_reward_reads_a_sampled_answer_where_it_reads_one_of_a_data_set(demo):
    talk = chat.read(demo / "model")
    said = Sample(key="k", question="q", media=(), responses=(Response(text="The pole is red.", score=1.0),))
    (written,) = chat.responses(talk, said).responses
    sampled = written[: written.tolist().index(talk.end_id) + 1]
    assert len(sampled) < len(written), "this template puts a line break behind an answer"
    assert rollout.as_written(talk, sampled).tolist() == written.tolist()
    for whole_or_cut in (written, written[:2], written[:0]):
        assert rollout.as_written(talk, whole_or_cut).tolist() == whole_or_cut.tolist()
