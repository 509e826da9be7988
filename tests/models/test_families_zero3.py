"""Every family under ZeRO-3 on two ranks, of which one has no media in each step, against one rank without ZeRO."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from fastpo.data.loader import step_samples
from fastpo.fit import fit
from tests.models import run_families
from tests.test_fit import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    run_families.write(root)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    line = [sys.executable, *launch, "-m", "tests.models.run_families", str(root), str(root / "2")]
    subprocess.run(line, check=True, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return root


def shapes(folder):
    stored = [load_file(file) for file in folder.glob("*.safetensors")]
    return {name: weight.shape for tensors in stored for name, weight in tensors.items()}


@pytest.mark.parametrize("family", run_families.NAMES)
def test_two_ranks_one_without_media_equal_one(trained, family):
    fit(run_families.run(trained, family, trained / "1", zero=0))
    one, two = (
        [json.loads(line) for line in (trained / ranks / family / "metrics.jsonl").read_text().splitlines()]
        for ranks in ("1", "2")
    )
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "margin", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    folders = (trained / ranks / family / "checkpoints" / "step_000002" / "model" for ranks in ("1", "2"))
    plain, sharded = map(shapes, folders)
    assert plain and plain == sharded, "the names of the weights that are written"
    assert one[1]["loss"] != pytest.approx(one[0]["loss"], abs=1e-6), "the first update changed the model"


def test_every_step_has_one_row_with_media_and_one_without():
    assert all({i % 2 for i in step_samples(4, s, prompts=2, seed=0)} == {0, 1} for s in range(2))
