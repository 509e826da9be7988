"""Every objective learns: `python -m fastpo.demo [--all | NAME ...] [--out DIR] [--quick] [--seed S]`.

One supervised warm-up teaches a tiny model to see and to speak (but to guess where GRPO and PPO ask). Then each
objective, of all or of those named, trains on its own data format, and a table says what came of it on clips that no
run has seen. The exit code is 1 where a target is missed. --quick: a few steps on a few rows, whose loss has to fall
(of sampled answers: to be finite).

`python -m fastpo.demo --recipes [NAME ...]`: runs the files of configs/, or those named, for a few steps, each with its
own loss and data format on made-up rows, on a tiny model of its family that has learnt the form of the answers; prints
the command of each, which runs alone as well, and a table.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastpo import metrics
from fastpo.config import Run, Source, load, warmup_run
from fastpo.data import recipes, synthetic, tasks

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = CONFIGS / "demo.yaml"
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
        # the shape is seen late, after some 200 steps; at 3e-3 never: the colour's scores saturate first
        {"loss": {"name": "reward_list"}, "optim": {"lr": 2e-3, "steps": 300, "warmup": 0.05}},
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


class Recipe(NamedTuple):
    """model: a family that data.recipes writes, or the run before whose merged weights these are. data: its rows.
    metric: of the evaluation. overrides: beside those of `commands`.
    """

    model: str
    data: str
    metric: str = "accuracy"
    overrides: tuple[str, ...] = ()
    lr: str = "1e-3"  # the authors' own moves weights that come from a random start by nothing


FEW_ANSWERS = ("batch.prompts=8", "rollout.generation.max_tokens=80")
HEAD = "optim.lr_value=1e-2"  # a value head starts at 0 and here has a dozen steps
RECIPES: Mapping[str, Recipe] = {
    "rrpo_llavavideo": Recipe("llava_onevision", "rrpo"),
    "dpo_llavavideo": Recipe("llava_onevision", "rrpo"),
    "perpo_llava15": Recipe("llava", "boxes"),
    "perpo_llavanext": Recipe("llava_onevision", "misread"),
    "miadpo_llava15": Recipe("llava", "mia"),
    "spo_sft_llavaov": Recipe("llava_onevision", "llava", "loss"),
    "spo_llavaov": Recipe("spo_sft_llavaov", "spo"),
    "sft_llava": Recipe("llava", "stills", "loss"),
    "rm_llava15": Recipe("llava", "ranked", "accuracy", (HEAD,)),
    "ppo_llava15": Recipe(
        "llava", "prompts", "reward",
        (
            HEAD, "rollout.reward_model={out}/rm_llava15", "rollout.generation.max_tokens=12",
            "rollout.gae.critic_steps=4",
        ),
    ),
    "grpo_visualrft_classification": Recipe("qwen2_vl", "classes", "reward", FEW_ANSWERS, "3e-4"),
    "grpo_visualrft_detection": Recipe("qwen2_vl", "detection", "reward", FEW_ANSWERS, "3e-4"),
    "grpo_visualrft_grounding": Recipe("qwen2_vl", "grounding", "reward", FEW_ANSWERS, "3e-4"),
    "demo": Recipe("", "", "accuracy", ("warmup.steps=60",)),
}  # fmt: skip
FIRST = {"spo_llavaov": "spo_sft_llavaov", "ppo_llava15": "rm_llava15"}  # run -> the one that it goes on from


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
    rows = {"train": 2, "test": 1} if quick else {"train": 80, "test": 16}
    if not synthetic.built(out / "data", seed=seed, **rows):
        tasks.write(out / "data", seed, **rows)
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


def try_recipes(out: Path, names: Sequence[str] = tuple(RECIPES), *, quick: bool = False, seed: int = 0) -> str:
    """Runs these files of configs/ and those that they go on from; returns, and writes to out/recipes.md, their table
    and commands. The same call goes on where the last one was stopped. Raises ValueError for a folder of other runs.
    """
    from fastpo import merge, train

    names = [name for name in RECIPES if name in names or name in {FIRST.get(other) for other in names}]
    rows, lines = [], []
    teach(out, {RECIPES[name].model for name in names}, quick=quick, seed=seed)
    for name in names:
        for module, argv in commands(name, out, steps=2 if quick else 12, seed=seed):
            lines.append(shlex.join(["python", "-m", f"fastpo.{module}", *argv]))
            metrics.say(f"\n$ {lines[-1]}")
            if module == "train":
                train.main(argv)
            elif not Path(argv[-1]).exists():
                merge.main(argv)
        rows.append(summary(name, out / name))
    titles = (
        "| recipe | loss, first step | last step | held out | before | after |",
        "|---|--:|--:|---|--:|--:|",
    )
    text = "\n".join([*titles, *rows, "", "```bash", *lines, "```"]) + "\n"
    (out / "recipes.md").write_text(text, encoding="utf-8")
    return text


def teach(out: Path, families: set[str], *, quick: bool, seed: int) -> None:
    """Writes out/data, and the models of these families to out/<family> after supervised steps on all weights."""
    from fastpo.fit import fit

    rows = {"train": 2, "test": 1} if quick else {"train": 8, "test": 4}
    if not synthetic.built(out / "data", seed=seed, **rows):
        recipes.write(out / "data", seed, **rows)
    for family, data in recipes.TAUGHT.items():
        if family in families and not (out / family).exists():
            with tempfile.TemporaryDirectory(dir=out) as scratch:
                warmup = WARMUP_QUICK if quick else {"warmup": {"steps": 150, "lr": 3e-3, "prompts": 16}}
                task = Task(data, "llava", {}, {**WARMUP.overrides, "model.family": family, **warmup})
                run = configured("warmup", task, out, out / "data" / family, seed=seed, quick=False)
                model = fit(warmup_run(run.model_copy(update={"out": Path(scratch)}))) / "model"
                shutil.move(model, out / family)


def commands(name: str, out: Path, *, steps: int, seed: int = 0) -> list[tuple[str, list[str]]]:
    """Modules of fastpo, with their arguments, that try a recipe in small. Its loss stays its own."""
    recipe, config = RECIPES[name], os.path.relpath(CONFIGS / f"{name}.yaml")
    keys = [f"out={out / name}", f"optim.steps={steps}", *([f"seed={seed}"] if seed else [])]
    own = [text.format(out=out) for text in recipe.overrides]
    if not recipe.data:
        return [("train", [config, *keys, *own])]
    source = load(config).data.train
    assert isinstance(source, Source)
    data, first = out / "data" / recipe.data, FIRST.get(name) if recipe.model in RECIPES else None
    model = out / f"{first}_merged" if first else out / recipe.model
    keys += [
        f"model.path={model}", f"data.media_root={out / 'data'}", f"data.train.path={data}_train.json",
        f"data.eval={{name: {source.name}, path: {data}_test.json}}", "data.workers=0",
        f"optim.lr={recipe.lr}", *own,
    ]  # fmt: skip
    merge = ("merge", [f"{out / first / 'checkpoints'}/step_{steps:06d}", str(model)]) if first else None
    return [*([merge] if merge else []), ("train", [config, *keys])]


def summary(name: str, out: Path) -> str:
    """One row of the table of recipes, of the metrics.jsonl in `out`."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row] or [math.nan]  # no sampled answers had anything to prefer
    metric = RECIPES[name].metric
    before, after = (row[f"eval/{metric}"] for row in (rows[0], rows[-1]))
    return f"| {name} | {losses[0]:.4f} | {losses[-1]:.4f} | {metric} | {before:.3f} | {after:.3f} |"


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
    parser.add_argument("--recipes", action="store_true", help="of configs/ instead: " + ", ".join(RECIPES))
    parser.add_argument("--out", type=Path, help="runs/objectives, or runs/recipes")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    kind, there = ("recipe", RECIPES) if args.recipes else ("objective", TASKS)
    if unknown := sorted(set(args.names) - set(there)):
        parser.error(f"no {kind} {', '.join(unknown)}; there are {', '.join(there)}")
    names = tuple(there) if args.all or not args.names else args.names
    out = args.out or Path("runs") / f"{kind}s"
    try:
        if args.recipes:
            return print(try_recipes(out, names, quick=args.quick, seed=args.seed))
        found = demo(out, names, quick=args.quick, seed=args.seed)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    metrics.say(markdown(found))
    sys.exit(0 if all(outcome.reached for outcome in found) else 1)


if __name__ == "__main__":
    main()
