"""What the README shows runs as it stands."""

import importlib.util
import json
import re
from pathlib import Path

import torch

from fastpo.config import load
from fastpo.data.formats import DATASETS
from fastpo_kernels import Segments, losses

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, language
    return found


def test_first_screen_has_the_two_commands():
    first_screen = "\n".join(README.splitlines()[:25])
    assert "pip install -e . -c constraints.txt && python -m fastpo.train configs/demo.yaml" in first_screen
    assert "pip install -e '.[dev]' -c constraints.txt && pytest" in first_screen


def test_python_blocks_run_one_after_another():
    torch.manual_seed(0)
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["hidden"].grad.abs().sum() > 0 and torch.isfinite(names["hidden"].grad).all()
    assert names["out"].losses.shape == (2,)
    assert losses.needs(names["hinge"]) == {"logp", "ref_logp"}
    seg = Segments.build(tokens=[1, 2], groups=[2], score=[0.0, 1.0])
    hinge = names["hinge"](torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), seg, beta=0.1)
    torch.testing.assert_close(hinge.losses, torch.tensor([1 - 0.1 * (5 - 1)]))


def test_yaml_block_is_a_whole_configuration(tmp_path):
    (block,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(block)
    assert load(tmp_path / "mine.yaml").loss.options == {"beta": 0.1, "alpha": 0.01}


def test_json_block_is_a_row_of_rrpo(tmp_path):
    row = json.loads(blocks("json")[0])
    (tmp_path / "clips").mkdir()
    (tmp_path / row["media_path"]).write_bytes(b"not opened")
    sample = DATASETS["rrpo"](row, "train.json:0", tmp_path)
    assert [response.score for response in sample.responses] == [1.0, 0.0]


def test_files_and_modules_that_the_documents_name_exist():
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text()
        for path in re.findall(r"\b(?:configs|fastpo|tests|kernels)/[\w/]+\.(?:py|yaml)\b", text):
            assert (ROOT / path).exists() or path == "fastpo/rewards.py", f"{document}: {path}"
        for module in re.findall(r"(?:-m|--module) (fastpo[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{document}: {module}"
