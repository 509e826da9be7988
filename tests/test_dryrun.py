"""What --dry-run says of a data set, against a plan made by hand."""

import pytest
import torch

from fastpo.config import load
from fastpo.data.loader import Table
from fastpo.dryrun import balance, report
from fastpo.fit import make_feed
from fastpo.sample import Encoded
from tests.test_fit import RECIPE, options
from tests.test_rollout import config as rollout_config


def test_balance_is_the_busiest_ranks_share():
    made = [
        Encoded(key="", prompt=torch.zeros(tokens), responses=(), weights=None, scores=(), patches=patches)
        for tokens, patches in [(10, 100), (30, 0), (20, 0), (0, 50)]
    ]
    table = Table(samples=[], encoded=made, skipped=[])
    assert balance(table, [[[[0]], [[1]]], [[[2], [3]], [[]]]], 0.1) == pytest.approx((30 * 2 / 50 + 2) / 2)


def test_the_report_of_mixed_data_sets(demo, tmp_path, capsys):
    one = f"{{name: rrpo, path: {demo}/train.json, weight: 1.5}}"
    report(load(RECIPE, options(demo, tmp_path, f"data.train=[{one}]", f"data.eval=[{one}]")))
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "18 (0 skipped)" in out  # 12 rows, and half of them once more
    assert "work of the busiest rank / mean of ranks 1.000" in out
    assert "vision patches per row, mean and largest" in out


def test_the_report_of_a_rollout_counts_the_longest_answers(demo, tmp_path, capsys):
    run = load(rollout_config(demo, tmp_path / "out"))  # 7 prompts, 4 answers of at most 5 tokens to each
    report(run)
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    prompts = [len(e.prompt) for e in make_feed(run, 0, 1).read(run.data.train, keep="none").encoded]
    assert f"smallest and largest {min(prompts) + 4 * 5} and {max(prompts) + 4 * 5}" in out
    assert "optimizer steps 4 on 1 ranks" in out
    with pytest.raises(ValueError, match="batch.tokens: 60 holds no group"):
        report(load(rollout_config(demo, tmp_path / "out"), ["batch.tokens=60"]))
    with pytest.raises(ValueError, match="learns from sampled answers: add a rollout section"):
        report(load(rollout_config(demo, tmp_path / "out"), ["rollout=null"]))
