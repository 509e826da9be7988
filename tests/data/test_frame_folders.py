"""Videos that come as a folder with a picture for each frame."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpo.data import cache, formats, media
from fastpo.models import llava_video, qwen_vl
from fastpo.sample import BadSample, Media, Response, Sample, Sampling
from tests import tiny_qwen
from tests.data.test_media import picture


def folder(path: Path, *names: str, size: tuple[int, int] = (64, 48)) -> Media:
    """Picture k under the k-th name."""
    path.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        Image.fromarray(picture(k, size)).save(path / name)
    return Media(kind="video", path=path)


def test_frames_come_in_the_order_of_the_numbers_in_their_names(tmp_path):
    item = folder(tmp_path / "clip", *[f"c2_{k}.{'png' if k % 2 else 'PNG'}" for k in (0, 1, 2, 9, 10, 11, 100)])
    for frames in (1, 3, 7, 16):
        want = np.stack([picture(k) for k in media.uniform(7, frames)])
        np.testing.assert_array_equal(media.decode(item, frames), want)
    assert media.size(item) == (48, 64)
    counts = [media.frame_count(item, s) for s in (Sampling(frames=16), Sampling(frames=16, fps=2), Sampling(frames=4))]
    assert counts == [16, 7, 4]


def test_times_are_counted_at_the_rate_of_the_configuration(tmp_path):
    item = folder(tmp_path / "clip", *[f"{k}.jpg" for k in range(6)])
    assert media.frame_times(item.path, 3, 2.0) == (3.0, [0.0, 1.0, 2.0])
    with pytest.raises(BadSample, match="clip: a folder of frames has no times; set data.fps"):
        media.frame_times(item.path, 3, None)
    question = "<video>\nWhat?"
    assert "lasts for 3.00 seconds" in llava_video._timed(question, [media.frame_times(item.path, 3, 2.0)])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "no frames, the folder is empty"),
        ({"a.png": (8, 8), "b.png": (8, 6)}, "its frames differ in size: a.png 8 x 8, b.png 8 x 6"),
        ({"a.png": (8, 8), "b.gif": (8, 8)}, "holds b.gif, which is no frame"),
        ({"a.png": (8, 8), "b.jpg": "folder"}, "holds b.jpg, which is no frame"),
        ({"a.png": (8, 8), "b.jpg": "text"}, "b.jpg: not a readable image"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, made, message):
    for name, size in made.items():
        if size == "folder":
            (tmp_path / name).mkdir()
        elif size == "text":
            (tmp_path / name).write_bytes(b"no picture")
        else:
            folder(tmp_path, name, size=size)
    with pytest.raises(BadSample, match=message):
        media.decode(Media(kind="video", path=tmp_path), 4)


def test_rows_may_name_a_folder(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    item = folder(root / "clip", "1.jpg", "2.jpg")
    (root / "empty").mkdir()
    (folder(root / "odd", "1.jpg").path / "notes.txt").touch()
    folder(tmp_path / "outside", "1.jpg")
    row = {"prompt": "What moves?", "truth": "A ball."}

    def read(value: str) -> Sample:
        return formats.rollout(row | {"video": value}, "train.json:7", root)

    for value in ("clip", "clip/", "odd/../clip"):
        made = read(value)
        assert [(m.kind, m.path.resolve()) for m in made.media] == [("video", item.path)]
        assert made.question == "<video>\nWhat moves?"
    for value, reason in {
        "empty/": "no frames, the folder is empty",
        "odd": "holds notes.txt, which is no frame",
        "../outside": "leads out of data.media_root",
        "gone/": "gone/: neither a video",
        ".": "holds clip, which is no frame",
    }.items():
        with pytest.raises(BadSample, match=f"train.json, row 7, key video: .*{reason}"):
            read(value)


def test_a_cached_clip_is_made_again_where_a_frame_changes(tmp_path):
    item = folder(tmp_path, "1.png", "2.png")
    keys = [cache.key([item], "")]
    os.utime(tmp_path / "2.png", ns=(1, 1))
    keys.append(cache.key([item], ""))
    (tmp_path / "2.png").rename(tmp_path / "3.png")
    keys.append(cache.key([item], ""))
    assert len(set(keys)) == 3 and cache.key([item], "") == keys[-1]


def test_a_family_that_reads_times_asks_for_the_rate(tmp_path):
    p = qwen_vl.processor(tiny_qwen.folder(tmp_path / "model", "qwen3_vl"))
    item = folder(tmp_path / "clip", *[f"{k}.jpg" for k in range(4)])
    sample = Sample(key="k", question="<video>\nWhat?", media=(item,), responses=(Response(text="A", score=1.0),))
    text = p.chat.tokenizer.decode(qwen_vl.encode(p, sample, Sampling(frames=4, fps=2)).prompt)
    assert "<0.2 seconds>" in text and "<1.2 seconds>" in text  # of 2 s the frames at 0 and 0.5, and at 1 and 1.5
    with pytest.raises(BadSample, match="clip: a folder of frames has no times; set data.fps"):
        qwen_vl.encode(p, sample, Sampling(frames=4))
