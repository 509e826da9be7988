"""Pixels from files: uniformly sampled frames as uint8.

PyAV reads every video's packets first (no decoding), so that a broken file is refused before a decoder sees it; decord
decodes, and PyAV where decord cannot. A video may also be a folder with a picture for each frame.
"""

import logging
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from fastpo.sample import BadSample, Media, Sampling

try:
    import decord
except ImportError:  # no wheel for this platform
    decord = None
else:
    decord.logging.set_level(decord.logging.QUIET)

logger = logging.getLogger(__name__)

# Containers that store every packet's time stamp. In the others (avi, mpeg, ts, ...) FFmpeg makes some up.
STAMPED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Titles in another encoding than UTF-8 are nobody's loss. PyAV 19 takes them and no longer the argument.
LENIENT: dict[str, Any] = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}
FRAME = frozenset((".jpg", ".jpeg", ".png"))  # of a folder of frames


class Clip(NamedTuple):
    """What the packets of a video say. Time stamps are in the stream's units."""

    frames: int
    pts: list[int] | None  # [frames] in display order; None where they cannot be relied on
    keys: list[int]  # pts of the frames after which every frame decodes as it does from the start, ascending
    closed: bool  # whether these are all the frames that a container calls key frames


def decode(media: Media, frames: int) -> np.ndarray:
    """[F, h, w, 3] uint8 RGB. An image is one frame; a video gives `frames`, the k-th at index floor(k * len / frames).

    Sampling as pritamqu/RRPO a905573, train_llavavideo.py:1252-1261 (force_sample); a short clip repeats frames. Raises
    BadSample naming the file for one that is missing, empty, truncated, without video, or that does not decode.
    """
    assert frames > 0
    if media.path.is_dir():
        return _folder(media.path, frames)
    if not media.path.is_file():
        raise BadSample(f"{media.path}: no such file")
    if media.path.stat().st_size == 0:
        raise BadSample(f"{media.path}: empty file")
    if media.kind == "image" or media.path.suffix.lower() == ".gif":
        return _pillow(media, frames)
    clip = read_clip(media.path)
    wanted = uniform(clip.frames, frames)
    if decord is None:
        _log_once("decord is not installed, PyAV decodes all videos")
    else:
        try:
            return decode_decord(media.path, clip, wanted)
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, ValueError) as error:
            _log_once(f"{media.path}: PyAV decodes it, since decord cannot: {str(error).strip()[:200]}")
    return decode_pyav(media.path, clip, wanted)


def frame_count(media: Media, sampling: Sampling) -> int:
    """Frames that `sampling` takes of a video, from its packets (no decoding) where it asks for a rate; 1 of an image.

    Raises BadSample for a video that is broken or, under a rate, of unknown duration.
    """
    if media.kind == "image":
        return 1
    if sampling.fps is None:
        return sampling.frames
    return max(1, min(sampling.frames, round(duration(media.path, sampling.fps) * sampling.fps)))


@lru_cache(maxsize=65_536)
def duration(path: Path, fps: float | None = None) -> float:
    """Seconds that a video lasts, from its packets. Raises BadSample where they do not say.

    fps: data.fps, which is the rate at which the pictures of a folder were taken; a folder without it is BadSample.
    """
    if path.is_dir():
        if fps is None:
            raise BadSample(f"{path}: a folder of frames has no times; set data.fps to the rate they were taken at")
        return len(pictures(path)) / fps
    with _opened(path) as (container, stream):
        if container.duration:
            return container.duration / av.time_base
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
    raise BadSample(f"{path}: its duration is not known, which data.fps and the model's times of frames need")


@lru_cache(maxsize=65_536)
def size(media: Media) -> tuple[int, int]:
    """(height, width) that `decode` gives it: from an image's header, or a video's first frame, which alone says how it
    is turned. Raises BadSample."""
    if media.path.is_dir():
        return image_size(pictures(media.path)[0])
    if media.kind == "image" or media.path.suffix.lower() == ".gif":
        try:
            with Image.open(media.path) as image:
                return image.height, image.width
        except Exception as error:  # see _pillow
            raise BadSample(f"{media.path}: not a readable image: {error}") from error
    with _opened(media.path) as (container, stream):
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            turned = round(frame.rotation / 90) % 2
            return (frame.width, frame.height) if turned else (frame.height, frame.width)
    raise BadSample(f"{media.path}: no frames")


@lru_cache(maxsize=65_536)
def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from an image's header, before any EXIF rotation, as it is decoded. Raises BadSample."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:  # see _pillow
        raise BadSample(f"{path}: not a readable image: {error}") from error


def frame_times(path: Path, frames: int, fps: float | None = None) -> tuple[float, list[float]]:
    """Seconds that a video lasts, and at which its frames k * len / frames are shown, from its packets. fps: see
    `duration`."""
    seconds = duration(path, fps)
    count = len(pictures(path)) if path.is_dir() else read_clip(path).frames
    return seconds, [i * seconds / count for i in uniform(count, frames)]


def files_of(media: Media) -> list[Path]:
    """The file, or the pictures of a folder. Raises BadSample as `pictures`."""
    return pictures(media.path) if media.path.is_dir() else [media.path]


def pictures(folder: Path) -> list[Path]:
    """The frames of a folder in the order of the numbers in their names. Raises BadSample for one that holds none, or
    anything else."""
    try:
        found = sorted(folder.iterdir(), key=lambda path: _natural(path.name))
    except OSError as error:
        raise BadSample(f"{folder}: not a readable folder: {error.strerror}") from error
    if not found:
        raise BadSample(f"{folder}: no frames, the folder is empty")
    for path in found:
        if path.suffix.lower() not in FRAME or not path.is_file():
            raise BadSample(f"{folder}: holds {path.name}, which is no frame ({' '.join(sorted(FRAME))})")
    return found


def _natural(name: str) -> tuple[list[str | int], str]:
    """frame_9 before frame_10. Text and numbers take turns, so that they are never compared."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def _folder(path: Path, frames: int) -> np.ndarray:
    names = pictures(path)
    wanted = uniform(len(names), frames)
    found = {i: _pillow(Media(kind="image", path=names[i]), 1)[0] for i in sorted({*wanted})}
    shapes = {image.shape: names[i].name for i, image in found.items()}
    if len(shapes) > 1:
        sizes = ", ".join(f"{name} {shape[1]} x {shape[0]}" for shape, name in shapes.items())
        raise BadSample(f"{path}: its frames differ in size: {sizes}")
    return np.stack([found[i] for i in wanted])


def uniform(count: int, frames: int) -> list[int]:
    """Indices floor(k * count / frames)."""
    return [k * count // frames for k in range(frames)]


def read_clip(path: Path) -> Clip:
    """Counts the frames that will be shown (an edit list may hide some), from packets alone.

    Raises BadSample for a file that is no video, has no frame, or ends early: a packet is cut, or the last one ends
    more than two frames and 2 % before the duration that the container declares.
    """
    shown, keys, closed, end = [], [], True, 0.0
    with _opened(path) as (container, stream):
        codec, length = stream.codec_context.name, _nal_length(stream.codec_context.extradata)
        stamped = container.format.name in STAMPED
        for packet in container.demux():
            if packet.size == 0:
                continue
            if packet.is_corrupt:
                raise BadSample(f"{path}: truncated, a packet at {end:.1f} s is cut")
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index:
                continue
            if packet.is_keyframe and packet.pts is not None:
                whole = codec != "h264" or _is_idr(bytes(packet), length)
                keys += [packet.pts] * whole
                closed = closed and whole
            if not packet.is_discard:
                shown.append(packet.pts)
        declared = ((container.duration or 0) + min(container.start_time or 0, 0)) / av.time_base
    if not shown:
        raise BadSample(f"{path}: no frames")
    if declared - end > max(2 * end / len(shown), 0.02 * declared):
        raise BadSample(
            f"{path}: truncated, the container declares {declared:.1f} s and its packets end at {end:.1f} s"
        )
    known = [pts for pts in shown if pts is not None]
    pts = sorted(known) if stamped and len(set(known)) == len(shown) else None
    return Clip(len(shown), pts, sorted(keys), closed and codec in ("h264", "vp8", "vp9"))


def decode_decord(path: Path, clip: Clip, wanted: list[int]) -> np.ndarray:
    """[F, h, w, 3] uint8 of the wanted frames, in one thread: the loader's workers run side by side.

    Raises ValueError where decord 0.6 would give other frames without a word (found by comparing it with decoding from
    the start): in containers but mp4, mov, mkv and webm, after a key frame that is no fresh start (open GOP, usual in
    HEVC), and where an edit list hides frames, which it counts and makes up for by repeating the last one.
    """
    assert decord is not None
    if clip.pts is None or not clip.closed:
        raise ValueError("it does not seek exactly in such a file")
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    if len(reader) != clip.frames:
        raise ValueError(f"it counts {len(reader)} frames where {clip.frames} are shown")
    return reader.get_batch(wanted).asnumpy()


def decode_pyav(path: Path, clip: Clip, wanted: list[int]) -> np.ndarray:
    """[F, h, w, 3] uint8 of the wanted frames, from the nearest frames that decoding can start at. Raises BadSample."""
    found: dict[int, np.ndarray] = {}
    place: dict[int | None, int] = {pts: i for i, pts in enumerate(clip.pts or ())}

    def start(i: int) -> int:
        return bisect_right(clip.keys, clip.pts[i]) - 1 if clip.pts else -1

    with _opened(path) as (container, stream):
        stream.codec_context.thread_count = 1
        for key, run in groupby(sorted(set(wanted)), start):
            missing = set(run)
            if key >= 0:
                container.seek(clip.keys[key], stream=stream)
            for n, frame in enumerate(container.decode(stream)):
                i = n if clip.pts is None else place.get(frame.pts, -1)
                if i in missing:
                    missing.remove(i)
                    found[i] = _rgb(frame)
                if not missing:
                    break
    if lost := set(wanted) - found.keys():
        raise BadSample(f"{path}: frame {min(lost)} of {clip.frames} does not decode")
    if len(sizes := {image.shape[:2] for image in found.values()}) > 1:
        wide = ", ".join(f"{width} x {height}" for height, width in sorted(sizes))
        raise BadSample(f"{path}: its frames differ in size: {wide}")
    return np.stack([found[i] for i in wanted])


def _nal_length(extradata: bytes | None) -> int:
    """Bytes of the length before each NAL unit: ISO/IEC 14496-15, 5.3.3.1 (avcC)."""
    return (extradata[4] & 3) + 1 if extradata and len(extradata) > 4 else 4


def _is_idr(packet: bytes, length: int) -> bool:
    """Whether the first slice of an H.264 packet is an IDR slice (NAL type 5), before which nothing is referred to.

    Containers also call frames key at which an open GOP or an intra refresh begins.
    """
    at = 0
    while at + length < len(packet):
        kind = packet[at + length] & 31
        if 1 <= kind <= 5:
            return kind == 5
        at += length + int.from_bytes(packet[at : at + length], "big")
    return False


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream; what FFmpeg finds wrong meanwhile is a BadSample."""
    try:
        with av.open(str(path), **LENIENT) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise BadSample(f"{path}: no video stream")
            if not stream.codec_context:
                raise BadSample(f"{path}: no decoder for its video stream")
            yield container, stream
    except FFmpegError as error:
        raise BadSample(f"{path}: not a readable video: {error.strerror}") from error


def _rgb(frame: VideoFrame) -> np.ndarray:
    """[h, w, 3], turned upright."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _pillow(media: Media, frames: int) -> np.ndarray:
    try:
        with Image.open(media.path) as image:
            count = getattr(image, "n_frames", 1) if media.kind == "video" else 1
            wanted = uniform(count, frames if media.kind == "video" else 1)
            found = {}
            for i in sorted({*wanted, count - 1}):  # the last one too: that is where a cut gif shows
                image.seek(i)
                found[i] = _rgb_image(image)
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, EOFError, struct.error, ...
        raise BadSample(f"{media.path}: not a readable image: {error}") from error
    return np.stack([found[i] for i in wanted])


def _rgb_image(image: Image.Image) -> np.ndarray:
    """[h, w, 3] uint8, as LLaVA's `.convert("RGB")`: alpha dropped, EXIF orientation ignored. 16-bit grey, which Pillow
    would clip at 255, keeps its high byte, as Pillow does with 16-bit colour."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode} has no known range")
    return np.asarray(image.convert("RGB"))


@cache
def _log_once(message: str) -> None:
    logger.warning(message)
