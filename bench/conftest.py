"""Where rows go: `pytest bench --rows DIR`, bench/results without it."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    default = Path(__file__).parent / "results"
    parser.addoption("--rows", type=Path, default=default, help="folder of the JSON rows of benchmarks")


@pytest.fixture
def results(request) -> Path:
    return request.config.getoption("--rows")
