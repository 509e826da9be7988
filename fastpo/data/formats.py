"""Data set files to samples: one function per format, listed in DATASETS.

A format is `format(row, where, media_root, *, options) -> Sample`. where is "file:row" and becomes the sample's key. It
raises BadSample for a row that cannot be trained on, after checks that open no media file.
"""

import glob
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

from datasets import load_dataset

from fastpo.config import Source
from fastpo.data.phrases import TAG, strip_tags
from fastpo.plugins import resolve
from fastpo.sample import BadSample, Media, Response, Sample

Row = Mapping[str, Any]
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
VIDEO = frozenset(".mp4 .m4v .mov .avi .mkv .webm .gif .mpg .mpeg .wmv .flv .ts .3gp".split())
IMAGE = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff".split())
PLACEHOLDER = re.compile("<image>|<video>")


def samples(source: Source, media_root: Path) -> list[Sample | BadSample]:
    """Every row in file order: a sample, or what is wrong with the row. A sample's key is "path:row", counted from 0.

    Raises ValueError, naming the file and the line where there is one, for a file that cannot be read.
    """
    convert = resolve(DATASETS, source, key="data")
    found = []
    for number, row in enumerate(_rows(source.path)):
        try:
            found.append(convert(row, f"{source.path}:{number}", media_root))
        except BadSample as error:
            found.append(error)
    return found


def rrpo(row: Row, where: str, media_root: Path, *, require_phrases: bool = True) -> Sample:
    """RRPO's own rows: question, answer, pred, answer_masked, pred_masked, media_path (or video, as in their docs).

    The answer scores 1, pred 0. require_phrases: both sides need a <MASK> phrase (the authors leave other rows out);
    without it the two masked keys may be missing. Facts: pritamqu/RRPO a905573, train_llavavideo.py:1141-1178, 1348.
    """
    key = "video" if row.get("media_path") is None and row.get("video") is not None else "media_path"
    media = (_media(_text(row, where, key), where, key, media_root),)
    question = _text(row, where, "question")
    if len(PLACEHOLDER.findall(question)) == 1 and not PLACEHOLDER.match(question):
        # a lone placeholder goes first, as in preprocess_multimodal, train_llavavideo.py:414-417
        question = f"<video>\n{PLACEHOLDER.sub('', question).strip()}"
    question = _question(question, media, where, "question")
    answer = _response(_text(row, where, "answer"), where, "answer", score=1.0)
    pred = _response(_text(row, where, "pred"), where, "pred", score=0.0)
    responses = (
        replace(answer, tagged=_tagged(answer.text, row, where, "answer_masked", required=require_phrases)),
        replace(pred, tagged=_tagged(pred.text, row, where, "pred_masked", required=require_phrases)),
    )
    _differ(answer, pred, where, "pred")
    return Sample(key=where, question=question, media=media, responses=responses)


def dpo(row: Row, where: str, media_root: Path) -> Sample:
    """Pairs: prompt (or question), chosen, rejected, and media_path, video(s) or image(s): one path or a list.

    prompt, chosen and rejected are texts, or TRL's conversations: one user message, one assistant message, with a text
    or a list of parts ({"type": "text" | "image" | "video"}) as content.
    """
    key = "question" if row.get("prompt") is None and row.get("question") is not None else "prompt"
    media = _media_list(row, where, media_root)
    question = _question(_spoken(row, where, key, "user"), media, where, key)
    chosen = _response(_spoken(row, where, "chosen", "assistant"), where, "chosen", score=1.0)
    rejected = _response(_spoken(row, where, "rejected", "assistant"), where, "rejected", score=0.0)
    _differ(chosen, rejected, where, "rejected")
    return Sample(key=where, question=question, media=media, responses=(chosen, rejected))


DATASETS = MappingProxyType({"rrpo": rrpo, "dpo": dpo})


def bad(where: str, key: str, reason: str) -> BadSample:
    """The error for a row. where: "file:row"."""
    file, _, number = where.rpartition(":")
    return BadSample(f"{file}, row {number}, key {key}: {reason}")


def _rows(path: str) -> list[Any]:
    """Rows of a json, jsonl or parquet file, here or at an address (hf://datasets/org/name/file.json).

    Any other path is a data set of the hub, "org/name" or "org/name:split". A key that a row lacks may come as None.
    """
    reader, remote = READERS.get(Path(path).suffix), "://" in path
    if reader and not remote and not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        if reader is None:
            name, _, split = path.partition(":")
            return list(load_dataset(name, split=split or "train"))
        if remote:
            return list(load_dataset(reader, data_files=path, split="train"))
        return _local_rows(path, reader)
    except Exception as error:  # datasets lets through whatever its readers raise
        reason = _json_error(path) if reader == "json" else None
        raise ValueError(f"{path}: {reason or error.__cause__ or error or 'no rows'}") from error


def _local_rows(path: str, reader: str) -> list[Any]:
    """The folder for datasets' cache is new each time, since the usual one tells a file's versions apart by their time.

    One chunk, since datasets 5.2 forces the types of the first 10 MB on the rest: a late ["a.mp4"] became '["a.mp4"]'.
    """
    options: dict[str, Any] = {"chunksize": max(os.path.getsize(path), 1)} if reader == "json" else {}
    with TemporaryDirectory() as cache:
        return list(load_dataset(reader, data_files=glob.escape(path), split="train", cache_dir=cache, **options))


def _json_error(path: str) -> str | None:
    """What the standard library finds wrong with a file, with its line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    whole = text.lstrip().startswith("[")
    for number, line in enumerate([text] if whole else text.split("\n")):
        try:
            json.loads(line.strip() or "0")
        except json.JSONDecodeError as error:
            return f"line {number + error.lineno}: not valid JSON: {error.msg}"
    return None


def _text(row: Row, where: str, key: str) -> str:
    value = row.get(key)
    if value is None:
        raise bad(where, key, "missing")
    if not isinstance(value, str):
        raise bad(where, key, f"expected text, got {type(value).__name__}")
    return value


def _response(text: str, where: str, key: str, *, score: float) -> Response:
    if not text.strip():
        raise bad(where, key, "empty")
    if found := TAG.search(text) or PLACEHOLDER.search(text):
        raise bad(where, key, f"holds {found.group()}, which never reaches the model")
    return Response(text=text, score=score)


def _tagged(plain: str, row: Row, where: str, key: str, *, required: bool) -> str | None:
    if row.get(key) is None and not required:
        return None
    tagged = _text(row, where, key)
    try:
        text, phrases = strip_tags(tagged)
    except BadSample as error:
        raise bad(where, key, str(error)) from None
    if "".join(text.split()) != "".join(plain.split()):
        raise bad(where, key, f"differs from {key.removesuffix('_masked')} in more than tags and white space")
    if required and not phrases:
        raise bad(where, key, "no <MASK> phrase")
    return tagged


def _differ(better: Response, worse: Response, where: str, key: str) -> None:
    if better.text.strip() == worse.text.strip():
        raise bad(where, key, "both responses are the same, there is no preference")


def _question(text: str, media: tuple[Media, ...], where: str, key: str) -> str:
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


def _spoken(row: Row, where: str, key: str, role: Literal["user", "assistant"]) -> str:
    """A text, or the content of a conversation of one message."""
    value = row.get(key)
    if not isinstance(value, list):
        return _text(row, where, key)
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


def _media_list(row: Row, where: str, media_root: Path) -> tuple[Media, ...]:
    given = [key for key in ("media_path", "video", "videos", "image", "images") if row.get(key)]
    if len(given) > 1:
        raise bad(where, given[1], f"{given[0]} is given too; give one of them, with all paths in order")
    if not given:
        return ()
    key, value = given[0], row[given[0]]
    return tuple(_media(path, where, key, media_root) for path in (value if isinstance(value, list) else [value]))


def _media(value: Any, where: str, key: str, media_root: Path) -> Media:
    """A relative path is below media_root, also after "..", but a link there may lead anywhere: its owner made it."""
    if not isinstance(value, str) or not value.strip():
        raise bad(where, key, f"expected a path, got {value!r:.80}")
    suffix = Path(value).suffix.lower()
    if suffix not in VIDEO | IMAGE:
        raise bad(where, key, f"{value}: neither a video ({' '.join(sorted(VIDEO))}) nor an image suffix")
    if Path(os.path.normpath(value)).parts[0] == "..":
        raise bad(where, key, f"{value}: leads out of data.media_root")
    path = media_root / value
    if not os.path.isfile(path):
        raise bad(where, key, f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise bad(where, key, f"{path}: empty file")
    return Media(kind="video" if suffix in VIDEO else "image", path=path)
