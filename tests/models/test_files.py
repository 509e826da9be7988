"""Folders whose weights are not whole."""

import pytest
from safetensors.torch import load_file, save_file

from fastpo.config import Model
from fastpo.models import llava
from tests import tiny_families


def test_weights_that_are_not_there_are_refused_and_not_random(tmp_path):
    folder = tiny_families.write(tmp_path / "llava", "llava")
    (file,) = folder.glob("*.safetensors")
    cfg, whole = Model(path=str(folder), family="llava", dtype="float32"), load_file(file)
    llava.load(cfg)
    lost = {key: x for key, x in whole.items() if "projector.linear_1" not in key}
    assert len(lost) == len(whole) - 2
    save_file(lost, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"llava lacks 2 weights: model.multi_modal_projector.linear_1.bias, "):
        llava.load(cfg)
    cut = {key: x[:-1].contiguous() if "linear_1.bias" in key else x for key, x in whole.items()}
    save_file(cut, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="llava: its weights cannot be loaded: "):
        llava.load(cfg)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="llava: its weights cannot be loaded: .*incomplete"):
        llava.load(cfg)
