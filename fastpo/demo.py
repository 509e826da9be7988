"""Every objective learns: `python -m fastpo.demo [--all | NAME ...] [--out DIR] [--quick] [--seed S]`.

One supervised warm-up teaches a tiny model to see and to speak (but to guess where GRPO and PPO ask). Then each
objective, of all or of those named, trains on its own data format, and a table says what came of it on clips that no
run has seen. The exit code is 1 where a target is missed. --quick: a few steps on a few rows, whose loss has to fall
(of sampled answers: to be finite).
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fastpo.config import Run, load, warmup_run
from fastpo.data import tasks

BASE = Path(__file__).parents[1] / "configs" / "demo.yaml"
Overrides = Mapping[str, Any]  # dotted key of a configuration -> value


class Task(NamedTuple):
    """data: a name of tasks.ROWS. goals: a metric of the evaluation, or what `number` makes of it -> its target."""

    data: str
    format: str
    goals: Mapping[str, float]
    overrides: Overrides


COMMON: Overrides = {
    "model.family": "llava_onevision",  # reads videos, one image, several images
    "data.synthetic": None,
    "data.frames": 2,
    "data.workers": 0,
    "warmup": None,
    "engine.zero": 0,
    "optim": {"lr": 3e-3, "steps": 30, "warmup": 0.05},
    "log.tensorboard": False,
}
QUICK: Overrides = {"optim": {"lr": 3e-3, "steps": 4, "warmup": 0}, "batch.prompts": 4}
WARMUP = Task(
    "warmup", "llava", {},
    {"loss": {"name": "sft"}, "warmup": {"steps": 240, "lr": 3e-3, "prompts": 20}},
)  # fmt: skip
WARMUP_QUICK: Overrides = {"warmup": {"steps": 3, "lr": 1e-3, "prompts": 4}}
SAMPLED: Overrides = {"group": 8, "generation": {"max_tokens": 3}, "rewards": [{"name": "classification"}]}
LONGER: Overrides = {"optim": {"lr": 5e-3, "steps": 80, "warmup": 0.05}}
ACCURACY = {"accuracy": 0.9}
TASKS: Mapping[str, Task] = {
    "sft": Task(
        "llava", "llava", {"loss": 0.05},
        {"loss": {"name": "sft"}, **LONGER},
    ),
    "dpo": Task("dpo", "dpo", ACCURACY, {"loss": {"name": "dpo"}}),
    "rrpo": Task("rrpo", "rrpo", ACCURACY, {"loss": {"name": "rrpo", "beta": 0.1, "alpha": 0.01}}),
    "mia_dpo": Task("mia", "mia", ACCURACY, {"loss": {"name": "dpo"}}),
    "perpo": Task("perpo", "perpo", {"kendall tau": 0.6}, {"loss": {"name": "perpo"}}),
    "plackett_luce": Task("ranked", "ranked", ACCURACY, {"loss": {"name": "plackett_luce"}}),
    "spo": Task("spo", "spo", {**ACCURACY, "question_accuracy": 0.9}, {"loss": {"name": "spo"}}),
    "reward_pair": Task("words", "dpo", ACCURACY, {"loss": {"name": "reward_pair"}, **LONGER}),
    "reward_list": Task(
        "ranked", "ranked", ACCURACY,
        {"loss": {"name": "reward_list"}, "optim": {"lr": 3e-3, "steps": 160, "warmup": 0.05}},
    ),
    "grpo": Task(
        "visual_rft", "visual_rft", {"reward": 0.9},
        {"loss": {"name": "grpo"}, "rollout": SAMPLED},
    ),
    "ppo": Task(
        "visual_rft", "visual_rft", {"reward, in deviations": 1.0, "reward/classification": 0.8},
        {
            "loss": {"name": "ppo"},
            **LONGER,
            "rollout": {
                **SAMPLED,
                "advantage": "gae",
                "updates": 2,
                "rewards": [{"name": "classification", "weight": 0}],  # not learned from, only looked at
            },
        },
    ),
}  # fmt: skip


class Outcome(NamedTuple):
    """One row of the table. seconds: of the objective's run."""

    objective: str
    metric: str
    before: float
    after: float
    target: str
    seconds: float
    reached: bool


def demo(out: Path, names: Sequence[str] = tuple(TASKS), *, quick: bool = False, seed: int = 0) -> list[Outcome]:
    """Runs the objectives of these names, and reward_pair before ppo; writes out/demo.json and out/demo.md.

    The same call goes on where the last one was stopped. Raises ValueError for a folder of other runs.
    """
    from fastpo.fit import fit, init_distributed  # torch and deepspeed take seconds to import

    init_distributed()
    if not (out / "data").exists():
        tasks.write(out / "data", seed, **({"train": 2, "test": 1} if quick else {}))
    first = configured("warmup", WARMUP, out, out / "data" / "model", seed=seed, quick=quick)
    model = fit(warmup_run(first)) / "model"
    found: list[Outcome] = []
    for name, task in TASKS.items():
        if name in names or (name == "reward_pair" and "ppo" in names):
            started = time.monotonic()
            fit(configured(name, task, out, model, seed=seed, quick=quick))
            found += outcomes(name, task, out / name, time.monotonic() - started, quick=quick)
    rows = [outcome._asdict() for outcome in found]
    (out / "demo.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "demo.md").write_text(markdown(found), encoding="utf-8")
    return found


def configured(name: str, task: Task, out: Path, model: Path, *, seed: int, quick: bool) -> Run:
    """configs/demo.yaml, with what all objectives share and then the task's own."""
    train, test = (out / "data" / f"{task.data}_{split}.json" for split in ("train", "test"))
    keys = {
        **COMMON,
        **task.overrides,
        **((WARMUP_QUICK if name == "warmup" else QUICK) if quick else {}),
        "out": out if name == "warmup" else out / name,
        "seed": seed,
        "model.path": model,
        "data.media_root": out / "data",
        "data.train": {"name": task.format, "path": train},
        "data.eval": {"name": task.format, "path": train if quick or name == "sft" else test},
    }
    if name == "ppo":
        keys["rollout"] = {**keys["rollout"], "reward_model": out / "reward_pair"}
    return load(BASE, [f"{key}={json.dumps(value, default=str)}" for key, value in keys.items()])


def outcomes(name: str, task: Task, out: Path, seconds: float, *, quick: bool = False) -> list[Outcome]:
    """The task's goals before and after its run, which has written metrics.jsonl into `out`."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first, *_, last = [row for row in rows if any(key.startswith("eval/") for key in row)]
    sampled = "rollout" in task.overrides
    found = []
    for metric, target in ({"reward" if sampled else "loss": math.inf} if quick else task.goals).items():
        before, after = number(metric, first, out), number(metric, last, out)
        if quick:
            wanted, reached = ("finite", math.isfinite(after)) if sampled else ("falls", after < before)
        else:
            wanted, reached = (
                (f"<= {target}", after <= target) if metric == "loss" else (f">= {target}", after >= target)
            )
        found.append(Outcome(name, metric, before, after, wanted, seconds, reached))
    return found


def number(metric: str, row: Mapping[str, float], out: Path) -> float:
    """A metric of an evaluation's row of metrics.jsonl. Two are derived:

    "kendall tau": pairs in the order of their scores less pairs in the other, as a share of both.
    "reward, in deviations": standard deviations above the mean of the answers before the first step.
    """
    if metric == "kendall tau":
        return 2 * row["eval/accuracy"] - 1
    if metric == "reward, in deviations":
        answers = [json.loads(line) for line in (out / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
        start = [answer["reward"] for answer in answers if answer["step"] == 0]
        return (row["eval/reward"] - statistics.mean(start)) / statistics.stdev(start)
    return row[f"eval/{metric}"]


def markdown(found: Sequence[Outcome]) -> str:
    """The table. Every metric is of held-out rows but sft's, of the rows that it learns by heart."""
    titles = ("objective", "metric", "before", "after", "target", "seconds", "")
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---:|---:|---:|---|"]
    for o in found:
        end = "reached" if o.reached else "MISSED"
        lines.append(
            f"| {o.objective} | {o.metric} | {o.before:.3f} | {o.after:.3f} | {o.target} | {o.seconds:.0f} | {end} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.demo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - set(TASKS)):
        parser.error(f"no objective {', '.join(unknown)}; there are {', '.join(TASKS)}")
    names = tuple(TASKS) if args.all or not args.names else args.names
    try:
        found = demo(args.out, names, quick=args.quick, seed=args.seed)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    Console().print(markdown(found), highlight=False, markup=False, soft_wrap=True)
    sys.exit(0 if all(outcome.reached for outcome in found) else 1)


if __name__ == "__main__":
    main()
