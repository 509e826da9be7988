"""`--dry-run`: the resolved configuration, what the data set packs to, and an estimate of memory. Loads no weights."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForImageTextToText

from fastpo import metrics, rollout
from fastpo.config import Rollout, Run
from fastpo.data import loader
from fastpo.fit import check_rollout, kept_responses, make_data, make_feed, total_steps
from fastpo.models import FAMILIES, trainable
from fastpo.plugins import resolve
from fastpo_kernels import losses

GIB = 2**30


def report(run: Run) -> None:
    """Prints the report. Raises ValueError for what a real run would refuse before its first step."""
    make_data(run)
    check_rollout(run, losses.needs(resolve(losses.LOSSES, run.loss, key="loss")))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    feed = make_feed(run, rank=0, ranks=ranks)
    table = feed.read(run.data.train, keep=kept_responses(run))
    if run.rollout:
        table = rollout.readable(run, table)
        rollout.check(run, table)
        table = longest_answers(table, run.rollout)
    total = total_steps(run, len(table))
    steps = min(total, -(-len(table) // run.batch.prompts))
    chosen = [loader.step_samples(len(table), s, prompts=run.batch.prompts, seed=run.seed) for s in range(steps)]
    plans = [feed.plan(table, step) for step in chosen]
    rows = [row for step in plans for rank in step for row in rank if row]
    lengths = [e.tokens for e in table.encoded]
    filled = [sum(lengths[n] for n in row) for row in rows]
    patches = [sum(table.encoded[n].patches for n in row) for row in rows]
    separate = sum(
        len(r) + len(table.encoded[n].prompt) for step in chosen for n in step for r in table.encoded[n].responses
    )

    metrics.say(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
    facts = {
        "samples": f"{len(table):,} ({len(table.skipped):,} skipped)",
        "optimizer steps": f"{total:,} on {ranks} ranks",
        "tokens per sample, mean": f"{sum(lengths) / len(lengths):,.0f}",
        "tokens per sample, smallest and largest": f"{min(lengths):,} and {max(lengths):,}",
        "micro-batches per step and rank, mean": f"{sum(len(step[0]) for step in plans) / steps:.2f}",
        "packing efficiency, tokens / batch.tokens": f"{sum(filled) / (len(filled) * run.batch.tokens):.1%}",
        "vision patches per row, mean and largest": f"{sum(patches) / len(patches):,.0f} and {max(patches):,}",
        "work of the busiest rank / mean of ranks": f"{balance(table, plans, run.batch.patch_cost):.3f}",
        "tokens saved by sharing prompts": f"{1 - sum(filled) / separate:.1%} of {separate:,}",
    }
    metrics.table("data", [{"what": what, "number": number} for what, number in facts.items()])
    metrics.table(
        "memory per rank, estimated", [{"what": k, "GiB": v / GIB} for k, v in memory(run, max(filled), ranks).items()]
    )


def longest_answers(table: loader.Table, cfg: Rollout) -> loader.Table:
    """The table with `group` answers of `generation.max_tokens` to each prompt: the most that will be packed."""
    answers = (torch.zeros(cfg.generation.max_tokens, dtype=torch.int64),) * cfg.group
    return replace(table, encoded=[replace(e, responses=answers) for e in table.encoded])


def balance(table: loader.Table, plans: list[list[list[list[int]]]], patch_cost: float) -> float:
    """Of tokens + patch_cost * patches, mean over the steps; 1 where all ranks have as much to do. plans: [steps]."""
    sizes = [e.size for e in table.encoded]
    found = []
    for ranks in plans:
        work = [sum(sizes[n].tokens + patch_cost * sizes[n].patches for row in rows for n in row) for rows in ranks]
        found.append(max(work) * len(work) / sum(work))
    return sum(found) / len(found)


def memory(run: Run, tokens: int, ranks: int) -> Mapping[str, float]:
    """Bytes per rank by part, for a packed row of `tokens`, from shapes alone (the model is built without storage)."""
    config = AutoConfig.from_pretrained(Path(run.model.path))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        trained, everything = trainable.count(trainable.prepare(model, FAMILIES[run.model.family].parts, run.model))
    width = 4 if run.model.dtype == "float32" else 2
    text = config.text_config
    share = {0: (1, 1, 1), 1: (1, 1, ranks), 2: (1, ranks, ranks), 3: (ranks, ranks, ranks)}[run.engine.zero]
    copies = 2 if run.reference.mode == "copy" else 1
    kept = 1 if run.model.gradient_checkpointing else 16  # hidden-sized tensors a layer keeps for backward
    parts = {
        "weights": copies * everything * width / share[0],
        "gradients": trained * width / share[1],
        "optimizer": trained * (8 if width == 4 else 12) / share[2],
        "activations": tokens * text.hidden_size * width * (text.num_hidden_layers * kept + 16),
    }
    return parts | {"sum": sum(parts.values())}
