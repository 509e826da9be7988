"""Frames by a budget of tokens, through the feed of a whole run."""

from dataclasses import replace

import pytest

from fastpo.config import load
from fastpo.fit import make_feed
from fastpo.models import FAMILIES, budget
from fastpo.sample import BadSample, Sample, Sampling
from tests import parity, tiny_qwen
from tests.test_fit import RECIPE, options
from tests.test_rollout import config


def test_frames_of_a_sample_fit_and_its_pixels_are_as_many(demo, tmp_path):
    run = load(RECIPE, options(demo, tmp_path))
    whole = make_feed(run, 0, 1).read(run.data.train).encoded[0]
    video = whole.prompt.mode().values  # the placeholder, of which there are most
    each = int((whole.prompt == video).sum()) // 4
    run = load(RECIPE, options(demo, tmp_path, f"data.video_tokens={3 * each - 1}", f"data.cache={tmp_path / 'kept'}"))
    feed = make_feed(run, 0, 1)
    table = feed.read(run.data.train)
    for sample, encoded in list(zip(table.samples, table.encoded, strict=True))[:2]:
        assert int((encoded.prompt == video).sum()) == 2 * each
        assert len(feed.pixels(sample)) == 2
    small = load(RECIPE, options(demo, tmp_path, f"data.video_tokens={each - 1}"))
    with pytest.raises(
        BadSample, match=rf"train.json:0: {each} tokens with one frame a video, more than .*: {each - 1}"
    ):
        make_feed(small, 0, 1).read(run.data.train)


def test_the_most_frames_that_fit_whatever_is_said_of_them(tmp_path):
    """Qwen2-VL, which takes frames in pairs and makes them smaller the more there are."""
    family, cfg = FAMILIES["qwen2_vl"], tiny_qwen.folder(tmp_path / "model", "qwen2_vl")
    processor, item = family.processor(cfg), parity.video(tmp_path, 60, 44, frames=30)

    def encode(sample, sampling):
        return family.encode(processor, sample, sampling)

    def tokens(sample, frames):
        return int((encode(sample, Sampling(frames=frames)).prompt == processor.config.video_token_id).sum())

    sample = Sample(key="a:0", question="<video>\nWhat moves?", media=(item,), responses=())
    limit = tokens(sample, 9)
    found = budget.within(encode, Sampling(frames=24), limit + 5, sample).frames
    assert 9 <= found < 24 and tokens(sample, found) <= limit + 5 < tokens(sample, found + 2) + 5
    longer = replace(sample, question="<video>\n" + "What moves there, and where to? " * 9)
    assert budget.within(encode, Sampling(frames=24), limit + 5, longer).frames == found
    assert budget.within(encode, Sampling(frames=24), 10**6, sample).frames == 24
    still = replace(sample, question="Why?", media=())
    assert budget.within(encode, Sampling(frames=24), 1, still).frames == 24


def test_vllm_which_reads_all_frames_is_refused(demo, tmp_path):
    with pytest.raises(ValueError, match="vllm reads data.frames of every video, not data.video_tokens"):
        load(config(demo, tmp_path / "out"), ["rollout.engine=vllm", "data.video_tokens=90"])
