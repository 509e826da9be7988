"""`python -m fastpo.evaluate CONFIG`: a model on the run's held-out file, as a table and as JSON.

Where rewards are named (rollout.rewards, or --metric), the likeliest answer to each prompt is scored by them; otherwise
the loss and its metrics, the share of preferences that the model shares among them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastpo import answers, metrics, rewards, rollout
from fastpo.config import Generation, Plugin, Run
from fastpo.data import loader
from fastpo.data.loader import Feed
from fastpo.fit import make_feed
from fastpo.models.files import VALUE_HEAD
from fastpo.models.policy import Policy
from fastpo.models.trained import Opened, open_model, weights
from fastpo.plugins import resolve
from fastpo.step import meter_for, record
from fastpo_kernels import TokenStats, losses

Found = dict[str, Any]


def evaluate(run: Run, cfg: Generation, adapter: Path | None, named: tuple[Plugin, ...]) -> Found:
    """{"rows": n, "metrics": {name: mean}}, with rewards also "answers". Raises ValueError, BadSample."""
    if run.data.eval is None:
        raise ValueError("data.eval: not given, there is nothing to evaluate on")
    feed = make_feed(run, 0, 1)
    if named:
        return _judged(run, cfg, adapter, feed, rewards.terms(named))
    return _preferred(run, adapter, feed)


def _judged(run: Run, cfg: Generation, adapter: Path | None, feed: Feed, terms: tuple[rewards.Term, ...]) -> Found:
    """The rewards of greedy answers, and their means."""
    assert run.data.eval is not None
    table = rollout.readable(run, feed.read(run.data.eval, keep="none"), terms)
    for _, reason in table.skipped:
        print(f"skipped: {reason}")
    opened = open_model(run.model, adapter, answers.device())
    greedy = cfg.model_copy(update={"temperature": 0.0})
    order, rows = range(len(table)), []
    for sample, prompt in answers.paced(answers.prompts(feed, table, order), len(order), "answers"):
        (text,) = answers.texts(opened, prompt, greedy, count=1, seed=0)
        _, parts = rewards.total(terms, text, sample.truth, where=sample.key)
        rows.append({"key": sample.key, "answer": text, "truth": sample.truth, **parts})
    if not rows:
        raise ValueError(f"{answers.paths(run.data.eval)}: no row could be decoded")
    return {"rows": len(rows), "metrics": means([term.name for term in terms], rows), "answers": rows}


def means(names: Sequence[str], rows: Sequence[Found]) -> dict[str, float]:
    """Mean of each reward; for box_iou also acc@0.5, the share of rows with an IoU of 0.5 or more."""
    found = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    if "box_iou" in found:
        found["acc@0.5"] = sum(row["box_iou"] >= 0.5 for row in rows) / len(rows)
    return found


@torch.no_grad()
def _preferred(run: Run, adapter: Path | None, feed: Feed) -> Found:
    """Means of the run's loss and its metrics over packed rows."""
    assert run.data.eval is not None
    objective = resolve(losses.LOSSES, run.loss, key="loss")
    needs = losses.needs(objective)
    if needs & set(losses.ROLLOUT):
        raise ValueError(f"loss.name: {run.loss.name} learns from sampled answers: name rewards with --metric")
    table = feed.read(run.data.eval)
    device = answers.device()
    policy = _policy(run, open_model(run.model, adapter, device), adapter, needs, device)
    meter = meter_for(objective, device)
    steps = loader.in_order(len(table), run.batch.prompts)
    skipped = 0
    for window in answers.paced(feed.windows(table, steps), len(steps), "steps"):
        for batch in window:
            out = policy(batch.to(device))
            stats = (
                out._asdict()
                if isinstance(out, TokenStats)
                else out.tokens._asdict() | {"value": out.value, "reward": out.reward}
            )
            record(meter, objective(**{name: stats.get(name) for name in needs}, seg=batch.to(device).segments))
            skipped += len(batch.skipped)
    return {"rows": len(table) - skipped, "metrics": meter.reduce()}


def _policy(run: Run, opened: Opened, adapter: Path | None, needs: frozenset[str], device: str) -> Policy:
    """The reference is model.path without the adapter, whatever the run's reference.mode; "none" stays none."""
    mode = run.reference.mode if needs & set(losses.REFERENCE) else "none"
    if mode != "none" and adapter is None:
        raise ValueError(
            f"loss.name: {run.loss.name} compares with a reference, which is model.path: name what was trained with "
            "--adapter"
        )
    if mode != "none" and (mode != "adapter_off" or not hasattr(opened.model, "peft_config")):
        mode = "copy"
    reference = opened.family.load(run.model) if mode == "copy" else None
    policy = Policy(
        opened.model, opened.family, opened.processor, mode=mode, stats=needs, reference=reference, backend=run.backend
    )
    policy.train_features = mode == "copy"  # a frozen model hides that its projector was trained: no shared features
    if policy.value_head is not None:
        place = weights(adapter or Path(run.model.path)) / VALUE_HEAD
        if not place.is_file():
            raise ValueError(f"{place}: no such file, and the loss {run.loss.name} reads a value head")
        policy.value_head.load_state_dict(load_file(place))
        policy.value_head.to(getattr(torch, run.model.dtype))
    return policy.to(device).eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.evaluate", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="also generation.max_tokens=... and so on"
    )
    parser.add_argument("--adapter", type=Path, help="a checkpoint, or an adapter's or a whole model's folder")
    parser.add_argument("--metric", action="append", default=[], help="a reward, by default all of rollout.rewards")
    parser.add_argument("--out", type=Path, help="a .json file, with all answers where answers are scored")
    args = parser.parse_intermixed_args(argv)
    try:
        run, cfg = answers.configured(args.config, args.overrides)
        given = answers.plugins(args.metric, "--metric")
        found = evaluate(run, cfg, args.adapter, given or (run.rollout.rewards if run.rollout else ()))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    assert run.data.eval is not None
    print(f"{answers.paths(run.data.eval)}: {found['rows']} rows")
    metrics.table("", [{"metric": name, "mean": value} for name, value in found["metrics"].items()])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"config": str(args.config), "adapter": args.adapter and str(args.adapter), **found}
        args.out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
