"""Every objective runs on its own data in small; what the table says of a run."""

import json
import math

import pytest

from fastpo import demo
from fastpo_kernels.losses import LOSSES


def test_quick_runs_every_objective(tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        demo.main(["--quick", "--out", str(out)])
    assert stop.value.code == 0, capsys.readouterr().out[-3000:]
    rows = json.loads((out / "demo.json").read_text())
    assert [row["objective"] for row in rows] == list(demo.TASKS)
    assert all(math.isfinite(row["after"]) for row in rows)
    assert sum(row["after"] < row["before"] for row in rows) >= 9, "all but the two with sampled answers"
    assert (out / "demo.md").read_text() in capsys.readouterr().out


def test_there_is_a_task_for_every_loss():
    assert {task.overrides["loss"]["name"] for task in demo.TASKS.values()} == set(LOSSES)


def write(out, evaluations, rewards=()):
    rows = [{"step": n, **{f"eval/{k}": v for k, v in row.items()}} for n, row in enumerate(evaluations)]
    (out / "metrics.jsonl").write_text(
        "\n".join(json.dumps(row) for row in [*rows[:1], {"step": 1, "loss": 9}, rows[1]])
    )
    (out / "rollouts.jsonl").write_text("\n".join(json.dumps({"step": s, "reward": r}) for s, r in rewards))


@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("dpo", {"accuracy": 0.5}, {"accuracy": 0.9}, [(0.5, 0.9, True)]),
        ("dpo", {"accuracy": 0.5}, {"accuracy": 0.89}, [(0.5, 0.89, False)]),
        ("perpo", {"accuracy": 0.5}, {"accuracy": 0.79}, [(0, 0.58, False)]),
        ("perpo", {"accuracy": 0.25}, {"accuracy": 1.0}, [(-0.5, 1, True)]),
        ("sft", {"loss": 1.0}, {"loss": 0.049}, [(1, 0.049, True)]),
        ("sft", {"loss": 0.01}, {"loss": 0.051}, [(0.01, 0.051, False)]),
        (
            "ppo",
            {"reward": 2.0, "reward/classification": 0.25},
            {"reward": 5.0, "reward/classification": 0.7},
            [(-0.5, 1, True), (0.25, 0.7, False)],
        ),
    ],
)
def test_targets(tmp_path, name, before, after, expected):
    """Of the first rollout's rewards 1, 3, 5 the mean is 3 and the deviation 2."""
    write(tmp_path, [before, after], [(0, 1), (0, 3), (0, 5), (2, 99)])
    found = demo.outcomes(name, demo.TASKS[name], tmp_path, 1.0)
    assert [(o.before, o.after, o.reached) for o in found] == [
        (pytest.approx(b, abs=1e-12), pytest.approx(a), reached) for b, a, reached in expected
    ]
    if not all(o.reached for o in found):
        assert "MISSED" in demo.markdown(found)


def test_a_missed_target_is_exit_code_1_and_an_unknown_name_2(tmp_path, monkeypatch):
    missed = demo.Outcome("dpo", "accuracy", 0.5, 0.6, ">= 0.9", 1.0, False)
    monkeypatch.setattr(demo, "demo", lambda *_, **__: [missed])
    for argv, code in ((["dpo", "--out", str(tmp_path)], 1), (["ddpo"], 2)):
        with pytest.raises(SystemExit) as stop:
            demo.main(argv)
        assert stop.value.code == code
