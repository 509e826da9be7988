"""The losses' Triton kernels: interpreted against plain code, and compiled for GPUs that are not here."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpo_kernels import Segments
from fastpo_kernels.loss_kernel import MAX_RESPONSES, launch
from fastpo_kernels.testing_aot import SHARED_LIMIT, cost

CHECKS = Path(__file__).parent / "interpreted_loss_kernel.py"
KERNELS = Path(__file__).parents[2] / "kernels"


def test_interpreted_kernels_equal_plain_losses():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, str(CHECKS)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == CHECKS.read_text().count("\ndef check_")


def pairs(size):
    n = torch.empty(1000, device="meta")
    options = launch.PairOptions(size, beta=0.1, gamma=0.5, alpha=0.01, smoothing=0.1, scale=0.5, MEAN=size > 2)
    phrases, kl = (torch.zeros(1000, dtype=torch.bool), n) if size == 2 else (None, None)
    tokens = [1000] + [0] * (size - 1)
    seg = Segments.build(tokens=tokens, groups=[size], score=torch.arange(float(size)), weight=phrases)
    return launch.pairs(n, n, kl, seg, options)[0]


def grpo(sequence):
    n = torch.empty(1000, device="meta")
    options = launch.GrpoOptions(0.8, 1.2, beta=0.04, length=None, scale=0.5, SEQUENCE=sequence, KL_RATIO=True)
    seg = Segments.build(tokens=[1000], groups=[1], score=[0.0])
    return launch.grpo(n, n, n, n[:1], seg, options)[0]


LAUNCHES = {
    "pairs of 2": functools.partial(pairs, 2),
    "pairs of many": functools.partial(pairs, MAX_RESPONSES),
    "grpo": functools.partial(grpo, False),
    "gspo": functools.partial(grpo, True),
}


@pytest.mark.parametrize("name, capability", [*((name, 80) for name in LAUNCHES), ("pairs of 2", 90), ("grpo", 90)])
def test_nothing_spills(name, capability):
    """With every optional argument, since each costs registers."""
    made = LAUNCHES[name]()
    found = cost(made.kernel, made.args, capability, num_warps=made.num_warps)
    print(f"{name} sm_{capability}: {found.registers} registers, {found.spilled} B spilled, {found.shared} B shared")
    assert found.spilled == 0, f"{name} spills {found.spilled} bytes"
    assert found.shared <= SHARED_LIMIT[capability] and "atom." not in found.ptx, name
