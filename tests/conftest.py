"""Shared data: the built-in demo in small, written once per session."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    from fastpo.data import synthetic

    out = tmp_path_factory.mktemp("demo") / "data"
    synthetic.write(out, 0, train=12, test=6)
    return out
