"""Visual features on disk, where tower and projector are frozen: a sample is decoded and seen once, for all runs.

What is kept is what `Family.vision` says of one sample alone, so that it does not depend on the row it was made in; a
row's features are its samples' joined. Beside one call for a whole row they differ by the rounding of other sizes.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.data import cache
from fastpo.models.trainable import part_of
from fastpo.sample import Encoded, Features, Media, MicroBatch, Shown

Gathered = Callable[[list[nn.Parameter]], AbstractContextManager]  # Engine.gathered
ALONE = "features"  # the name of a tensor that is no tuple's


def fingerprint(model: nn.Module, parts: Any, gathered: Gathered) -> str:
    """SHA-256 of every weight of the tower and the projector as loaded. Collective under ZeRO-3.

    Not of the files: their times change with a copy, and blocks of them can miss a projector among gigabytes.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if part_of(name, parts) in ("vision", "projector"):
            with gathered([parameter]):
                digest.update(repr((name, tuple(parameter.shape), parameter.dtype)).encode())
                digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def look(folder: Path, facts: str, encoded: Encoded, media: Sequence[Media]) -> Encoded:
    """The sample with its file and, where that is there, its features. Without pictures or their files: as it is.

    facts: what features depend on beside the media. media: none for the blank image, which brings its pixels.
    """
    if not (media or encoded.pixels is not None) or not all(item.path.exists() for item in media):
        return encoded
    file = folder / f"{cache.key(media, facts)}.safetensors"
    found = cache.found(file)
    if found is None:
        return replace(encoded, file=file)
    features = found[ALONE] if ALONE in found else tuple(found[str(i)] for i in range(len(found)))
    return replace(encoded, file=file, features=features, pixels=None)


def keep(file: Path, features: Features, limit: int) -> None:
    """Writes a sample's features, unless they are larger than `limit` bytes or not finite."""
    named = {ALONE: features} if isinstance(features, Tensor) else {str(i): x for i, x in enumerate(features)}
    if sum(x.nbytes for x in named.values()) <= limit and all(bool(x.isfinite().all()) for x in named.values()):
        cache.write(file, {name: x.cpu().contiguous() for name, x in named.items()})


def calls(batch: MicroBatch, chunk: int | None) -> int:
    """Of the tower for the samples of a row that are not cached. chunk: pictures in one call; None: all."""
    pixels = [shown.pixels for shown in _missing(batch).values()]
    return sum(1 if chunk is None else math.ceil(len(x) / chunk) for x in pixels if x is not None)


def agreed(batch: MicroBatch, chunk: int | None, largest: Callable[[int], int]) -> MicroBatch:
    """With as many calls on every rank, as ZeRO-3 needs: none where no rank misses a sample. largest: over ranks."""
    return replace(batch, calls=largest(calls(batch, chunk))) if batch.shown else batch


def of_row(vision: Callable[..., Features], batch: MicroBatch, limit: int) -> Features:
    """A row's features: those found, and those of the other samples, which are made one by one and kept.

    vision: (pixels, grid) -> features. limit: bytes of the folder; the files used longest ago go first.
    """
    device, missing = batch.ids.device, _missing(batch)
    made = {file: seen(vision, shown, device) for file, shown in missing.items()}
    for file, features in made.items():
        keep(file, features, limit)
    for folder in {file.parent for file in made}:
        cache.clear(folder, limit)
    return _joined([made[x.file] if x.features is None else _moved(x.features, device) for x in batch.shown])


def seen(vision: Callable[..., Features], shown: Shown | Encoded, device: torch.device) -> Features:
    """One sample's features, from its pixels."""
    assert shown.pixels is not None
    grid = torch.zeros(0, dtype=torch.int64) if shown.grid is None else shown.grid
    return vision(shown.pixels.to(device), grid.to(device))


def _missing(batch: MicroBatch) -> dict[Path, Shown]:
    """Once each, although samples may share a clip."""
    return {shown.file: shown for shown in batch.shown if shown.features is None}


def _moved(features: Features, device: torch.device) -> Features:
    return features.to(device) if isinstance(features, Tensor) else tuple(x.to(device) for x in features)


def _joined(parts: Sequence[Features]) -> Features:
    tensors = [x for x in parts if isinstance(x, Tensor)]
    if tensors:
        return torch.cat(tensors)
    return tuple(torch.cat(same) for same in zip(*parts, strict=True))
