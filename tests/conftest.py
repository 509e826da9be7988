"""Shared: the built-in demo in small and two ranks, both made once per session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import ranks

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    from fastpo.data import synthetic

    out = tmp_path_factory.mktemp("demo") / "data"
    synthetic.write(out, 0, train=12, test=6)
    return out


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[ranks.Train]:
    with ranks.pair() as train:
        yield train
