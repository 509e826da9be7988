"""Rows of a data set file: json, jsonl, parquet, or a data set of the hub."""

import glob
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import load_dataset

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def rows(path: str) -> list[Any]:
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
