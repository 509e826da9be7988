"""What --dry-run says of a data set, against a plan made by hand."""

import pytest
import torch

from fastpo.config import load
from fastpo.data.loader import Table
from fastpo.dryrun import balance, report
from fastpo.sample import Encoded
from tests.test_fit import RECIPE, options


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
