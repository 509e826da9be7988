"""GEMM passes over the supervised rows, ours beside the peers of the benchmark, printed as a table (pytest -rP)."""

import pytest

from bench import harness
from bench.bench_head import IGNORED, Case, batch, variants
from bench.harness import Variant

H, V = 32, 2048
COMPILED = ("ml-cross-entropy", "Liger")  # for seconds each; the benchmark has their counts
OURS = {"dpo": 3.0, "rrpo": 3.0, "perpo": 3.0, "grpo": 2.0, "sft": 4.0}  # rrpo: and the share of the rows with KL


@pytest.mark.parametrize("loss", OURS)
def test_table(loss):
    case = Case(loss, 4, 32, 1 / 3, H, V, compiled=False)
    x = batch(case)
    labelled, chosen = (int((target != IGNORED).sum()) for target in (x.target, x.target[: x.chosen]))
    counted = {
        name: harness.gemm_passes(made.run, labelled, H, V) if isinstance(made, Variant) else made
        for name, made in variants(case).items()
        if name.split(",")[0] not in COMPILED
    }
    print(f"\n{loss}, {labelled} of {case.rows * case.positions} positions labelled")
    for name, passes in counted.items():
        print(f"{name:42}{passes if isinstance(passes, str) else round(passes, 2)}")
    ours = OURS[loss] + (chosen / labelled if loss == "rrpo" else 0)
    assert counted["fastpo, raw"] == pytest.approx(ours) and counted["fastpo, compact"] == pytest.approx(ours)
    if loss == "sft":
        assert counted["fastpo folded, compact"] == pytest.approx(3.0)
    # nobody makes do with less, but for RRPO and SFT those who keep whole logits from the forward to the backward
    least = min(OURS[loss], 3.0)
    assert min(passes for passes in counted.values() if not isinstance(passes, str)) == pytest.approx(least)
