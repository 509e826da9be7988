"""python -m fastpo.train --list."""

import pytest

from fastpo import train
from fastpo.data.formats import DATASETS
from fastpo.models import FAMILIES
from fastpo.rewards import REWARDS
from fastpo_kernels.losses import LOSSES


def test_everything_is_listed_with_a_line_and_the_configs_that_use_it(capsys):
    train.main(["--list"])
    paragraphs = dict(text.split(":\n", 1) for text in capsys.readouterr().out.rstrip().split("\n\n"))
    for kind, table in (("losses", LOSSES), ("rewards", REWARDS), ("formats", DATASETS), ("families", FAMILIES)):
        lines = [line for line in paragraphs[kind].splitlines() if not line.strip().startswith("configs: ")]
        assert [line.split()[0] for line in lines] == list(table)
        assert all(len(line.split()) > 2 for line in lines), "a name without its line"
    for kind, name in (("losses", "rrpo"), ("formats", "rrpo"), ("families", "llava_video")):
        rows = iter(paragraphs[kind].splitlines())
        assert any(row.split()[0] == name for row in rows) and "demo.yaml" in next(rows)
    assert "demo.yaml" not in paragraphs["rewards"]


def test_a_configuration_is_still_required(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([])
    assert stop.value.code == 2 and "config" in capsys.readouterr().err
