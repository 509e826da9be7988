"""Rows chosen by optimal transport: the plan against plain Sinkhorn steps, and the command."""

import json

import pytest
import torch
import torch.nn.functional as F

from fastpo import select
from tests.test_fit import RECIPE, options


def sinkhorn(cost, reg, steps=2000):
    """Alternate scaling of rows and columns, in float64, as in Cuturi 2013."""
    kernel = (-cost / reg).exp()
    rows, columns = (torch.full((n,), 1 / n, dtype=torch.float64) for n in cost.shape)
    v = torch.ones_like(columns)
    for _ in range(steps):
        u = rows / (kernel @ v)
        v = columns / (kernel.T @ u)
    return u[:, None] * kernel * v


def test_costs_are_those_of_the_entropic_plan():
    draw = torch.Generator().manual_seed(0)
    source, target = (F.normalize(torch.randn(n, 5, generator=draw, dtype=torch.float64), dim=1) for n in (7, 4))
    cost = 1 - source @ target.T
    plan = sinkhorn(cost, 0.1)
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(
        select.row_costs(source, target, reg=0.1), (plan * cost).sum(1) * 7, rtol=1e-6, atol=1e-9
    )


def test_the_command_keeps_whole_rows_in_order_those_nearest_to_the_target(demo, tmp_path):
    """The target's rows are among the source's: moving those costs nothing."""
    table = json.loads((demo / "train.json").read_text())
    aim = [table[n] for n in (7, 2, 5)]
    (tmp_path / "aim.json").write_text(json.dumps(aim))
    line = ["--target", str(tmp_path / "aim.json"), "--keep", "3", "--reg", "0.002"]
    select.main([str(RECIPE), str(tmp_path / "new" / "kept.jsonl"), *line, *options(demo, tmp_path / "run")])
    kept = [json.loads(text) for text in (tmp_path / "new" / "kept.jsonl").read_text().splitlines()]
    assert kept == [table[n] for n in (2, 5, 7)]
    listed = tmp_path / "mixture.yaml"
    listed.write_text(f"datasets: [{{json_path: {demo / 'train.json'}, sampling_strategy: 'first:10'}}]")
    # data.train's own rule and weight mean nothing for the target
    more = [f"data.train.path={listed}", "data.train.weight=2", "data.train.rule=first:1"]
    line[line.index("3")] = "6"
    select.main([str(RECIPE), str(tmp_path / "twice.jsonl"), *line, *options(demo, tmp_path / "run"), *more])
    kept = [json.loads(text) for text in (tmp_path / "twice.jsonl").read_text().splitlines()]
    assert kept == [table[n] for n in (2, 5, 7)] * 2
    with pytest.raises(SystemExit, match="exists already"):
        select.main([str(RECIPE), str(tmp_path / "new" / "kept.jsonl"), *line, *options(demo, tmp_path / "run")])
