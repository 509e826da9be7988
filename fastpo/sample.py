"""A sample is one prompt with scored responses; a micro-batch is a packed forest of samples.

Axes: N supervised tokens, T packed tokens, S responses, P prompts, F frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastpo_kernels import Segments, Tree


class BadSample(ValueError):
    """A row that cannot be trained on. The message names the file, the row and the key. row: "file:row" once known."""

    row: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    kind: Literal["video", "image"]
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One more turn of a conversation. trained: its tokens are supervised, where it stands in a response."""

    role: Literal["user", "assistant"]
    text: str
    trained: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """text never holds tags; tagged is the same text with <MASK> phrases, or None. Higher score is better.

    role: who says text; "user" for a question that the model learns to ask. parent: the place in Sample.responses of
    the response that this one continues, None: it continues the prompt. turns: what follows text in the same response,
    so that a conversation of several turns is one response with all of the assistant's turns trained.
    """

    text: str
    score: float
    tagged: str | None = None
    role: Literal["user", "assistant"] = "assistant"
    parent: int | None = None
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """key is "file:row", unique in a run. question holds one "<image>" or "<video>" placeholder per media item.

    turns: what follows question in the prompt, assistant and user in turn, without placeholders and never trained.
    truth: the ground truth that rewards of sampled answers read; None where the row has none. phrases: RRPO's are those
    that are "tagged", or the runs of tokens in which the two responses have "different" ones (VideoChat2's rows).
    """

    key: str
    question: str
    media: tuple[Media, ...]
    responses: tuple[Response, ...]
    turns: tuple[Turn, ...] = ()
    truth: Any = None
    phrases: Literal["tagged", "different"] = "tagged"


Features = Tensor | tuple[Tensor, ...]  # what a family's `vision` returns


class Shown(NamedTuple):
    """The pictures of one sample where features are cached: in `file`, either found or still to be made of pixels."""

    file: Path
    features: Features | None
    pixels: Tensor | None
    grid: Tensor | None


class Size(NamedTuple):
    """What a sample takes: tokens of the packed row, patches of the vision tower."""

    tokens: int
    patches: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Which frames of a video are read: `frames` of them, evenly spread, or at most that many at `fps` a second."""

    frames: int
    fps: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One tokenised sample. Placeholders are expanded; prompt and responses are segments of the tree.

    prompt: [n] int64. responses: S tensors [n_s] int64. weights: S tensors [n_s] float32 (RRPO phrase mask) or None.
    scores: S numbers. parents: for each response the one that it continues, -1 the prompt; None: all the prompt.
    trained: S tensors [n_s] bool, the supervised tokens; None: all. positions: [n] or, for M-RoPE, [3, n] of the
    prompt, None: counted from 0. patches: what the vision tower reads, in patches.
    pixels: uint8, [F, 3, h, w] or rows of patches, None before decoding or without media; grid: [items, c] int64, what
    the family needs to know of each item (frames, height, width, ...). media: the files, for vLLM, which reads them.
    file, features: of the feature cache; where features were found, nothing is decoded.
    """

    key: str
    prompt: Tensor
    responses: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] | None
    scores: tuple[float, ...]
    parents: tuple[int, ...] | None = None
    trained: tuple[Tensor, ...] | None = None
    positions: Tensor | None = None
    patches: int = 0
    pixels: Tensor | None = None
    grid: Tensor | None = None
    media: tuple[Media, ...] = ()
    file: Path | None = None
    features: Features | None = None

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def size(self) -> Size:
        return Size(self.tokens, self.patches)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One packed row.

    ids: [T]; positions: [T] or [3, T] int64. at: [N] place in the row of the hidden state that predicts target: [N]
    int64. better: [N] bool, tokens of the better side of a pair; stays on the CPU, so that picking them does not sync.
    pixels, grid: those of the samples, in row order. keys: the samples; skipped: (key, reason) of those left out.
    ref_logp: [N], ref_hidden: [N, H], from the reference cache (rows without KL are 0).
    last: [S] place in the row of each response's last token. given: what a loss reads of a rollout (old_logp [N], ...).
    calls: at least as many calls of the vision tower are made for this row, where it runs in chunks.
    shown: with cached features, the samples that show something, in row order, on the CPU; pixels is empty then, and
    calls may be 0.
    """

    ids: Tensor
    positions: Tensor
    tree: Tree
    pixels: Tensor
    grid: Tensor
    at: Tensor
    target: Tensor
    segments: Segments
    better: Tensor
    last: Tensor
    keys: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    ref_logp: Tensor | None = None
    ref_hidden: Tensor | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    calls: int = 1
    shown: tuple[Shown, ...] = ()

    def to(self, device: torch.device | str) -> "MicroBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "better"}
        moved = {name: x.to(device) for name, x in values.items() if hasattr(x, "to")}
        return replace(self, **moved, given={name: x.to(device) for name, x in self.given.items()})
