"""Trains a tiny model of every family for two steps; test_families_zero3.py runs it on two ranks."""

import json
import sys
from pathlib import Path

from fastpo.config import Run
from fastpo.fit import fit
from tests import parity, tiny_families, tiny_qwen
from tests.models import test_internvl, test_mllama

NAMES = ("llava", "llava_next", "llava_onevision", *tiny_qwen.KINDS, "internvl", "mllama")


def write(root: Path) -> None:
    """One model folder per family, and rows of which every other one has no media."""
    for name in NAMES:
        path = root / name
        path.mkdir()
        if name in tiny_qwen.KINDS:
            tiny_qwen.folder(path, name)
        elif name in ("internvl", "mllama"):
            {"internvl": test_internvl, "mllama": test_mllama}[name].folder(path)
        else:
            tiny_families.write(path, name)
    first, second = (parity.image(root, w, h).path.name for w, h in ((41, 41), (45, 37)))
    rows = [
        {"prompt": "<image>?", "image": first, "chosen": "A.", "rejected": "B"},
        {"prompt": "Why?", "chosen": "Yes", "rejected": "No."},
        {"prompt": "<image> or <image>", "image": [second, first], "chosen": "Left", "rejected": "R"},
        {"prompt": "How?", "chosen": "So", "rejected": "Or so"},
    ]
    (root / "rows.json").write_text(json.dumps(rows))


def run(root: Path, name: str, out: Path, *, zero: int) -> Run:
    parts = dict.fromkeys(("train_vision", "train_projector", "train_head"), True)
    return Run.model_validate(
        {
            "out": out / name,
            "model": {"path": str(root / name), "family": name, "dtype": "float32", "lora": None, **parts},
            "data": {"train": {"name": "dpo", "path": str(root / "rows.json")}, "media_root": root, "workers": 0},
            "batch": {"prompts": 2, "tokens": 1500},
            "loss": {"name": "dpo"},
            "optim": {"lr": 1e-3, "steps": 2, "warmup": 0},
            "reference": {"mode": "copy"},
            "engine": {"zero": zero},
            "log": {"tensorboard": False},
        }
    )


if __name__ == "__main__":
    for family in NAMES:
        fit(run(Path(sys.argv[1]), family, Path(sys.argv[2]), zero=3))
