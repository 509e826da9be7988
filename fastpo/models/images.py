"""Images to uint8 pictures of the tower's size, in Pillow.

Bit for bit what transformers' *Pil image processors make with Pillow 11 and 12, and within 2 levels of what its
torchvision processors make: tests/golden/processors/README.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top it may want torchvision

from fastpo.data import media
from fastpo.models import files
from fastpo.sample import Encoded, Media


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a folder's image processor does."""

    side: int  # pixels of a picture's side, as the tower reads it
    shortest: int | None  # the shorter side is resized to this and the middle is cut out; None: both sides to `side`
    pad: bool  # to a square in the mean colour before resizing
    resample: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pinpoints: tuple[tuple[int, int], ...]  # anyres: heights and widths that an image may be resized to


def processor(folder: Path) -> Any:
    """transformers' own, which runs on Pillow: its settings are read, its pictures are what tests compare with."""
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


def settings(folder: Path, side: int) -> Settings:
    """Reads preprocessor_config.json for a tower of `side` pixels. Raises ValueError for what is not done here."""
    p = processor(folder)
    size, crop = dict(p.size), dict(p.crop_size or {})
    shortest = size.get("shortest_edge")
    pinpoints = tuple((int(h), int(w)) for h, w in getattr(p, "image_grid_pinpoints", ()))
    pad = bool(getattr(p, "do_pad", False)) and not pinpoints  # with tiles it speaks of batches
    made = crop if p.do_center_crop else dict(height=shortest, width=shortest) if pad and shortest else size
    wrong = {
        f"makes pictures of {made}, but the tower reads {side} x {side}": made != dict(height=side, width=side),
        f"resizes the shorter side to {shortest}, the tower's is {side}": shortest is not None
        and (shortest < side or (bool(pinpoints) and shortest != side)),
        f"has image_grid_pinpoints that are no multiples of {side}": any(x % side for hw in pinpoints for x in hw),
        "does not resize, rescale by 1 / 255 and normalize": not (
            p.do_resize and p.do_rescale and p.do_normalize and round(1 / p.rescale_factor, 6) == 255
        ),
    }
    for reason in (text for text, found in wrong.items() if found):
        raise ValueError(f"model.path: {folder}/preprocessor_config.json {reason}, which is not supported")
    return Settings(
        side=side,
        shortest=shortest,
        pad=pad,
        resample=Image.Resampling(p.resample),
        mean=tuple(p.image_mean),
        std=tuple(p.image_std),
        pinpoints=pinpoints,
    )


def check_frames(folder: Path, side: int | None) -> None:
    """Raises ValueError where a folder's videos have another mean or deviation than its images, another resampling than
    bicubic or, with side, another size."""
    _, still = files.settings(folder, "image_processor")
    file, moving = files.settings(folder, "video_processor")
    wanted: dict[str, Any] = {key: still[key] for key in ("image_mean", "image_std") if key in still}
    wanted["resample"] = Image.Resampling.BICUBIC.value
    if side is not None:
        wanted["size"] = dict(height=side, width=side)
    for key, want in wanted.items():
        if moving.get(key, want) != want:
            raise ValueError(f"model.path: {file}: {key} of videos is {moving[key]}, only {want} is supported")


def read(item: Media) -> Image.Image:
    """Decoded RGB. Raises BadSample."""
    return Image.fromarray(media.decode(item, 1)[0])


def picture(image: Image.Image, s: Settings) -> Image.Image:
    """side x side: padded to a square, or resized by its shorter side and cut, or resized whatever its shape."""
    image = square(image, s.mean) if s.pad else image
    if s.shortest is None:
        return resized(image, (s.side, s.side), s.resample)
    long = int(s.shortest * max(image.size) / min(image.size))
    width, height = (s.shortest, long) if image.width <= image.height else (long, s.shortest)
    left, top = (width - s.side) // 2, (height - s.side) // 2
    return resized(image, (width, height), s.resample).crop((left, top, left + s.side, top + s.side))


def resized(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """To (width, height): columns first, then rows, each rounded to 8 bits, as torchvision and Pillow 11 and 12.

    Pillow 13 takes rows first where that is less work (python-pillow/Pillow#9549): an overshoot that is clipped between
    the passes then makes up to 25 levels of difference, in upright pictures.
    """
    return image.resize((size[0], image.height), resample).resize(size, resample)


def frames(decoded: np.ndarray, size: int | tuple[int, int]) -> Tensor:
    """[F, h, w, 3] uint8 -> [F, 3, height, width] uint8, bicubic. size: (height, width), or one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return stack([resized(Image.fromarray(frame), (width, height)) for frame in decoded])


def square(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """In the middle of a square of the mean colour."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side), tuple(int(255 * x) for x in mean))
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def stack(pictures: list[Image.Image]) -> Tensor:
    """F pictures of one size -> [F, 3, h, w] uint8."""
    return torch.from_numpy(np.stack([np.asarray(x) for x in pictures])).permute(0, 3, 1, 2).contiguous()


def black(
    token_id: int, tokens: int, shape: tuple[int, ...], *, patches: int, grid: tuple[int, ...] | None = None
) -> Encoded:
    """Black pixels of a shape behind so many media tokens; no text, no responses. grid: its only row."""
    return Encoded(
        key="blank",
        prompt=torch.full((tokens,), token_id),
        responses=(),
        weights=None,
        scores=(),
        patches=patches,
        pixels=torch.zeros(shape, dtype=torch.uint8),
        grid=None if grid is None else torch.tensor([grid]),
    )


def normalized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[F, 3, h, w] uint8 -> float32, on the same device."""
    mu, sigma = (pixels.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
    return (pixels.float() / 255 - mu) / sigma
