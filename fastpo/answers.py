"""What the commands that let a model answer share: their options, the answers, the file that grows row by row."""

import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import ValidationError

from fastpo.config import Generation, Plugin, Run, Source, load
from fastpo.data import formats
from fastpo.data.loader import Feed, Table
from fastpo.models.generate import respond
from fastpo.models.trained import Opened
from fastpo.sample import BadSample, Encoded, Sample

Row = dict[str, Any]
T = TypeVar("T")


def configured(config: Path, overrides: Sequence[str]) -> tuple[Run, Generation]:
    """The run, and how it samples: rollout.generation with the overrides generation.KEY=value. Raises ValueError."""
    own = [item for item in overrides if item.startswith("generation.")]
    run = load(config, [item for item in overrides if item not in own])
    given = (run.rollout.generation if run.rollout else Generation()).model_dump()
    for item in own:
        key, equals, text = item.removeprefix("generation.").partition("=")
        if not equals:
            raise ValueError(f"override {item!r}: expected generation.KEY=value")
        given[key] = yaml.safe_load(text)
    try:
        return run, Generation.model_validate(given)
    except ValidationError as error:
        reasons = [f"generation.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError("\n".join(reasons)) from None


def plugins(texts: Sequence[str], option: str) -> tuple[Plugin, ...]:
    """Names, or "{name: ocr, ignore_case: true}". Raises ValueError."""
    found = []
    for text in texts:
        try:
            value = yaml.safe_load(text)
            found.append(Plugin.model_validate(value if isinstance(value, dict) else {"name": text}))
        except (yaml.YAMLError, ValidationError):
            raise ValueError(f"{option}: {text!r} is neither a name nor {{name: ..., option: ...}}") from None
    return tuple(found)


def paths(source: Source | Sequence[Source]) -> str:
    """The data sets' names, for a message."""
    return ", ".join(one.path for one in ([source] if isinstance(source, Source) else source))


def source_rows(samples: Iterable[Sample]) -> dict[str, Row]:
    """What the files hold for each sample's key, "file:row" or, of a row read again, "file:row#2"."""
    files: dict[str, list[Row]] = {}
    found = {}
    for sample in samples:
        file, _, number = sample.key.rpartition(":")
        if file not in files:
            files[file] = formats.rows(file)
        found[sample.key] = files[file][int(number.partition("#")[0])]
    return found


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def prompts(feed: Feed, table: Table, order: Sequence[int]) -> Iterator[tuple[Sample, Encoded]]:
    """The samples of `order` with their decoded prompts. What on_bad_sample: skip leaves out is printed."""
    found = feed.prompts(table, [[n] for n in order])
    for n, (decoded, skipped) in zip(order, found, strict=True):
        for _, reason in skipped:
            print(f"skipped: {reason}")
        if decoded:
            yield table.samples[n], decoded[0]


def texts(opened: Opened, prompt: Encoded, cfg: Generation, *, count: int, seed: int) -> tuple[str, ...]:
    """`count` answers. The random numbers follow from seed, the file's name and the row alone."""
    drawn = row_seed(seed, prompt.key)
    found = respond(
        opened.core, opened.family, opened.processor, prompt, cfg, count=count, seed=drawn, chunk=opened.chunk
    )
    return tuple(decoded(opened, answer) for answer in found)


def row_seed(seed: int, key: str) -> int:
    return random.Random(f"{seed}/{Path(key).name}").getrandbits(63)


def decoded(opened: Opened, ids: torch.Tensor) -> str:
    return opened.processor.chat.tokenizer.decode(ids, skip_special_tokens=True)


def media_row(sample: Sample, media_root: Path) -> Row:
    """media_path: the sample's files in order, relative to media_root where they are below it."""
    paths = [m.path.relative_to(media_root) if m.path.is_relative_to(media_root) else m.path for m in sample.media]
    return {"media_path": [str(path) for path in paths]} if paths else {}


def finished(path: Path) -> list[Row]:
    """Rows of a .jsonl file that is written row by row; a last line that broke off is cut away. Raises ValueError."""
    if not path.exists():
        return []
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
    if rest:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - len(rest))
    return rows


def keys(rows: Sequence[Row], path: Path) -> set[str]:
    """The key of every row. Raises ValueError where another program wrote the file."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or "key" not in row:
            raise ValueError(f"{path}, row {number}, key key: missing; this command did not write the file")
    return {row["key"] for row in rows}


def append(path: Path, rows: Iterable[Row]) -> int:
    """Writes each row as it comes; returns how many. Raises BadSample for what JSON cannot hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            try:
                text = json.dumps(row, ensure_ascii=False)
            except TypeError as error:
                raise BadSample(f"{row.get('key')}: cannot be written as JSON: {error}") from None
            file.write(text + "\n")
            file.flush()
            count += 1
    return count


def paced(items: Iterable[T], total: int, title: str, every: float = 5.0) -> Iterator[T]:
    """The items as they are; prints how far they are, every so many seconds."""
    start, said = time.monotonic(), -math.inf
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == total or now - said >= every:
            left = timedelta(seconds=round((now - start) / done * (total - done)))
            print(f"{title} {done}/{total}  ETA {left}", flush=True)
            said = now
