"""Bad rows as the loader tells of them, and every one counted."""

import json

import pytest
import torch
from PIL import Image

from fastpo.config import Batch, Data, Source
from fastpo.data import media
from fastpo.data.loader import Feed
from fastpo.sample import BadSample, Encoded

NOTHING = Encoded(key="", prompt=torch.zeros(1), responses=(), weights=None, scores=())


def feed(folder, on_bad_sample):
    """Of a family that looks at an image's header."""

    def encode(sample):
        for item in sample.media:
            media.size(item)
        return NOTHING

    source = Source(name="dpo", path=str(folder / "rows.json"))
    data = Data(train=source, media_root=folder, on_bad_sample=on_bad_sample)
    batch = Batch(prompts=1, tokens=16)
    return Feed(data=data, encode=encode, pixels=lambda _: None, blank=NOTHING, batch=batch, rank=0, ranks=1)


def test_every_bad_row_is_named_and_counted(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "junk.png").write_bytes(b"junk")
    names = ("good.png", "empty.png", "missing.png", "junk.png")
    rows = [{"prompt": "?", "image": name, "chosen": "a", "rejected": "b"} for name in names]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    skip = feed(tmp_path, "skip")
    table = skip.read(skip.data.train)
    assert [sample.key for sample in table.samples] == [f"{data}:0"]
    assert [key for key, _ in table.skipped] == [f"{data}:{n}" for n in (1, 2, 3)]
    for place, wanted in ((1, rf"{data}, row 1, key image: .*empty.png: empty"), (3, rf"{data}:3: .*junk.png: not a")):
        data.write_text(json.dumps([rows[0]] * place + [rows[place]]))
        stop = feed(tmp_path, "error")
        with pytest.raises(BadSample, match=wanted):
            stop.read(stop.data.train)
