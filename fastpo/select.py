"""`python -m fastpo.select CONFIG OUT.jsonl --target FILE --keep N`: the rows of data.train nearest to another file.

RoVRM (arXiv 2408.12109) trains its reward model in stages and takes for each the rows that the next stage's data are
closest to, by entropic optimal transport. Its repository has no code for it: embedding and cost are choices made here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpo import answers
from fastpo.config import Run, Source, load
from fastpo.data.loader import Feed, Table
from fastpo.data.pack import pack
from fastpo.fit import make_feed
from fastpo.models.trained import Opened, open_model


def select(run: Run, target: Source, out: Path, *, keep: int, reg: float = 0.05, adapter: Path | None = None) -> int:
    """Writes the `keep` rows of data.train that cost least to move to the target's, in their order; returns how many.

    Raises ValueError where `out` exists or the file has fewer rows.
    """
    if out.exists():
        raise ValueError(f"{out} exists already")
    train = one_source(run)
    feed = make_feed(run, 0, 1)
    table, aim = feed.read(train), feed.read(target)
    opened = open_model(run.model, adapter, answers.device())
    keys, source = embeddings(opened, feed, table)
    if not 0 < keep <= len(keys):
        raise ValueError(f"--keep {keep}: {train.path} has {len(keys)} usable rows")
    cost = row_costs(source, embeddings(opened, feed, aim)[1], reg=reg)
    chosen = sorted(cost.argsort(stable=True)[:keep].tolist())
    given = answers.source_rows(table.samples)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(given[keys[n]], ensure_ascii=False) + "\n" for n in chosen]
    out.write_text("".join(lines), encoding="utf-8")
    return len(lines)


@torch.no_grad()
def embeddings(opened: Opened, feed: Feed, table: Table) -> tuple[list[str], Tensor]:
    """Keys and [P, H] float64 of length 1: the mean of a row's last hidden states, its media and responses included."""
    keys, found = [], []
    order = range(len(table))
    for _, sample in answers.paced(answers.prompts(feed, table, order), len(order), "rows"):
        row = pack([sample], None).to(answers.device())
        features = None
        if sample.pixels is not None:
            features = opened.family.vision(opened.core, opened.processor, row.pixels, row.grid)
        hidden = opened.family.hidden(opened.core, row, features)
        keys.append(sample.key)
        found.append(hidden.double().mean(0).cpu())
    return keys, torch.nn.functional.normalize(torch.stack(found), dim=1)


def row_costs(source: Tensor, target: Tensor, *, reg: float) -> Tensor:
    """[P] what it costs to move each source row to the target rows, under the entropic plan of the whole sets.

    source: [P, H], target: [Q, H], of length 1. The cost of a pair is 1 - cosine; every row has the same mass. reg: the
    weight of the plan's entropy.
    """
    try:
        import ot
    except ImportError:
        raise ValueError("python -m fastpo.select needs the package POT: pip install 'fastpo[select]'") from None
    cost = 1 - source @ target.T
    mass = [torch.full((len(x),), 1 / len(x), dtype=torch.float64) for x in (source, target)]
    plan: Any = ot.sinkhorn(mass[0], mass[1], cost, reg, method="sinkhorn_log")
    return (plan * cost).sum(1) * len(source)


def one_source(run: Run) -> Source:
    """data.train. Raises ValueError where it is a mixture."""
    if not isinstance(run.data.train, Source):
        raise ValueError("data.train: rows are selected from one file, not from a mixture")
    return run.data.train


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.select", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path, help="jsonl file to write")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--target", required=True, help="the next stage's file")
    parser.add_argument("--format", help="of the target's rows, where it is not that of data.train")
    parser.add_argument("--keep", type=int, required=True)
    parser.add_argument("--reg", type=float, default=0.05)
    parser.add_argument("--adapter", type=Path)
    args = parser.parse_intermixed_args(argv)
    try:
        run = load(args.config, args.overrides)
        target = one_source(run).model_copy(update={"path": args.target, "rule": "all", "weight": 1.0})
        if args.format:
            target = Source(name=args.format, path=args.target)
        count = select(run, target, args.out, keep=args.keep, reg=args.reg, adapter=args.adapter)
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{count} rows in {args.out}")


if __name__ == "__main__":
    main()
