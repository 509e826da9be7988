"""Fewer frames of a sample's videos, so that they fit into a number of tokens, whatever the family makes of a frame."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastpo.sample import BadSample, Encoded, Sample, Sampling

Encode = Callable[[Sample, Sampling], Encoded]


def bounded(call: Callable[[Sample, Sampling], Any], encode: Encode, sampling: Sampling, limit: int, s: Sample) -> Any:
    """call(s, sampling) with as many frames as fit: `encode` itself, or what makes the pixels that go with it."""
    return call(s, within(encode, sampling, limit, s))


def within(encode: Encode, sampling: Sampling, limit: int, sample: Sample) -> Sampling:
    """The most frames up to sampling.frames with which the media of a sample with videos take at most `limit` tokens.

    The tokens are what `encode` makes of the media beside no words: two samples of the same media have the same frames.
    Raises BadSample where one frame of each video is too much.
    """
    if all(item.kind == "image" for item in sample.media):
        return sampling
    silent = replace(sample, question="", media=(), responses=(), turns=())
    shown = replace(silent, question="".join(f"<{item.kind}>" for item in sample.media), media=sample.media)
    without = len(encode(silent, sampling).prompt)

    def tokens(frames: int) -> int:
        return len(encode(shown, replace(sampling, frames=frames)).prompt) - without

    if tokens(sampling.frames) <= limit:
        return sampling
    if (least := tokens(1)) > limit:
        raise BadSample(f"{sample.key}: {least} tokens with one frame a video, more than data.video_tokens: {limit}")
    fits, too_many = 1, sampling.frames
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if tokens(middle) <= limit else (fits, middle)
    return replace(sampling, frames=fits)
