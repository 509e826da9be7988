"""Rows of a data set file: json, jsonl, parquet, or a data set of the hub."""

import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import load_dataset


def rows(path: str) -> list[Any]:
    """Rows of a json, jsonl or parquet file, here or at an address (hf://datasets/org/name/file.json).

    Any other path is a data set of the hub, "org/name" or "org/name:split". A key that a row lacks may come as None.
    Raises ValueError, naming the file and the line or row where there is one, for what cannot be read.
    """
    suffix, remote = Path(path).suffix, "://" in path
    if suffix in (".json", ".jsonl", ".parquet") and not remote and not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        if suffix in (".json", ".jsonl"):
            return _json_rows(path)
        if suffix == ".parquet":
            return _loaded("parquet", path if remote else glob.escape(path))
        name, _, split = path.partition(":")
        return list(load_dataset(name, split=split or "train"))
    except Exception as error:  # datasets lets through whatever its readers raise
        raise ValueError(f"{path}: {error.__cause__ or error or 'no rows'}") from error


def _json_rows(path: str) -> list[Any]:
    """By the standard library: datasets 5.2 makes one type of a key's values in all rows, so that "5" beside ["5"]
    became the number 5, and a late ["a.mp4"] became '["a.mp4"]'.
    """
    text = _loaded("text", path, sample_by="document")[0]["text"] if "://" in path else Path(path).read_text("utf-8")
    text = text.removeprefix("\ufeff")
    whole = text.lstrip().startswith("[")
    found: list[Any] = []
    for number, line in enumerate([text] if whole else text.split("\n")):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number + error.lineno}: not valid JSON: {error.msg}") from None
    found = found[0] if whole else found
    if not found:
        raise ValueError("no rows")
    for number, row in enumerate(found):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number}: expected keys and values, got {row!r:.80}")
    return found


def _loaded(reader: str, path: str, **options: Any) -> list[Any]:
    """The folder for datasets' cache is new each time, since the usual one tells a file's versions apart by their
    time.
    """
    with TemporaryDirectory() as cache:
        return list(load_dataset(reader, data_files=path, split="train", cache_dir=cache, **options))
