"""Checks of a row's fields, shared by the formats. None of them opens a media file."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastpo.data.media import pictures
from fastpo.data.phrases import TAG
from fastpo.sample import BadSample, Media, Response

Row = Mapping[str, Any]
VIDEO = frozenset(".mp4 .m4v .mov .avi .mkv .webm .gif .mpg .mpeg .wmv .flv .ts .3gp".split())
IMAGE = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff".split())
PLACEHOLDER = re.compile("<image>|<video>")
MEDIA_KEYS = ("media_path", "video", "videos", "image", "images", "image_path")


def bad(where: str, key: str, reason: str) -> BadSample:
    """The error for a row. where: "file:row"."""
    file, _, number = where.rpartition(":")
    return BadSample(f"{file}, row {number}, key {key}: {reason}")


def text(row: Row, where: str, key: str) -> str:
    """A text, which may be empty."""
    value = row.get(key)
    if value is None:
        raise bad(where, key, "missing")
    if not isinstance(value, str):
        raise bad(where, key, f"expected text, got {type(value).__name__}")
    return value


def plain(text: str, where: str, key: str) -> str:
    """The text, if it is not empty and holds no tag and no placeholder."""
    if not text.strip():
        raise bad(where, key, "empty")
    if found := TAG.search(text) or PLACEHOLDER.search(text):
        raise bad(where, key, f"holds {found.group()}, which never reaches the model")
    return text


def response(text: str, where: str, key: str, *, score: float) -> Response:
    return Response(text=plain(text, where, key), score=score)


def texts(row: Row, where: str, key: str) -> list[str]:
    """A list of texts that are `plain`."""
    return [plain(item, where, key) for item in any_texts(row, where, key)]


def any_texts(row: Row, where: str, key: str) -> list[str]:
    """A list of texts, whatever they hold."""
    value = row.get(key)
    if value is None:
        raise bad(where, key, "missing")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise bad(where, key, f"expected a list of texts, got {value!r:.80}")
    return value


def inner(row: Row, where: str, key: str) -> Row:
    """A nested row."""
    value = row.get(key)
    if not isinstance(value, Mapping):
        raise bad(where, key, "missing" if value is None else f"expected keys and values, got {type(value).__name__}")
    return value


def numbers(row: Row, where: str, key: str) -> list[float]:
    """A list of finite numbers. Raises BadSample for NaN, infinity and anything else, with its place in the list."""
    value = row.get(key)
    if value is None:
        raise bad(where, key, "missing")
    if not isinstance(value, list):
        raise bad(where, key, f"expected a list of numbers, got {value!r:.80}")
    for place, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
            raise bad(where, key, f"expected a finite number at place {place}, got {item!r}")
    return [float(item) for item in value]


def differ(better: Response, worse: Response, where: str, key: str) -> None:
    """Raises BadSample for a pair without a preference."""
    if better.text.strip() == worse.text.strip():
        raise bad(where, key, "both responses are the same, there is no preference")


def question(text: str, media: tuple[Media, ...], where: str, key: str) -> str:
    """The text with one placeholder per media item, named after its kind: RRPO writes <image> for a video as well."""
    if found := TAG.search(text):
        raise bad(where, key, f"holds {found.group()}, which never reaches the model")
    if not PLACEHOLDER.sub("", text).strip():
        raise bad(where, key, "empty")
    names = [f"<{item.kind}>" for item in media]
    found = len(PLACEHOLDER.findall(text))
    if found == 0:
        return "".join(f"{name}\n" for name in names) + text
    if found != len(names):
        raise bad(where, key, f"{found} placeholders for {len(names)} media items")
    unused = iter(names)
    return PLACEHOLDER.sub(lambda _: next(unused), text)


def spoken(row: Row, where: str, key: str, role: Literal["user", "assistant"]) -> str:
    """A text, or the content of a conversation of one message."""
    value = row.get(key)
    if not isinstance(value, list):
        return text(row, where, key)
    roles = [message.get("role") if isinstance(message, dict) else None for message in value]
    if roles != [role]:
        raise bad(where, key, f"expected one {role} message, got roles {roles}")
    content = value[0].get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return "\n".join(_part(part, where, key) for part in parts)


def _part(part: Any, where: str, key: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image" | "video" as kind}:
            return f"<{kind}>"
    raise bad(where, key, f"expected a text, image or video part, got {part!r:.80}")


def media_list(row: Row, where: str, media_root: Path) -> tuple[Media, ...]:
    """The items of the one media key that the row has, a path or a list."""
    given = [key for key in MEDIA_KEYS if row.get(key)]
    if len(given) > 1:
        raise bad(where, given[1], f"{given[0]} is given too; give one of them, with all paths in order")
    if not given:
        return ()
    key, value = given[0], row[given[0]]
    return tuple(media(path, where, key, media_root) for path in (value if isinstance(value, list) else [value]))


def media(value: Any, where: str, key: str, media_root: Path) -> Media:
    """A relative path is below media_root, also after "..", but a link there may lead anywhere: its owner made it.

    A folder is a video, its pictures the frames.
    """
    if not isinstance(value, str) or not value.strip():
        raise bad(where, key, f"expected a path, got {value!r:.80}")
    path, suffix = media_root / value, Path(value).suffix.lower()
    folder = os.path.isdir(path)
    if suffix not in VIDEO | IMAGE and not folder:
        raise bad(where, key, f"{value}: neither a video ({' '.join(sorted(VIDEO))}) nor an image suffix, nor a folder")
    if Path(os.path.normpath(value)).parts[:1] == ("..",):
        raise bad(where, key, f"{value}: leads out of data.media_root")
    if folder:
        try:
            pictures(path)
        except BadSample as error:
            raise bad(where, key, str(error)) from None
        return Media(kind="video", path=path)
    if not os.path.isfile(path):
        raise bad(where, key, f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise bad(where, key, f"{path}: empty file")
    return Media(kind="video" if suffix in VIDEO else "image", path=path)
