"""Which rows of each file are read: several data sets mixed, SPO's mixing rules and its YAML list of files."""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml

from fastpo.config import Source
from fastpo.data import formats
from fastpo.sample import BadSample, Sample

Row = TypeVar("Row")
_RULE = re.compile(r"(?:(first|end|random):)?(\d+(?:\.\d+)?)(%?)")


class Part(NamedTuple):
    """One file of a mixture. weight: how many times its rows are read, in parts too (0.5: every second row)."""

    path: str
    rule: str = "all"
    weight: float = 1.0


def samples(source: Source | Sequence[Source], media_root: Path, seed: int = 0) -> list[Sample | BadSample]:
    """The rows of all data sets, one after the other, as often as their weights say; see formats.samples.

    A row that is read more than once has "#2", "#3", ... at the end of its key; a bad one is told once. Raises
    ValueError naming the file for a rule or a file that cannot be read.
    """
    found: list[Sample | BadSample] = []
    times: Counter[str] = Counter()
    for one in [source] if isinstance(source, Source) else source:
        for file in _files(one):
            try:
                kept = repeat(mix(formats.samples(file, media_root), file.rule, seed), file.weight, seed)
            except ValueError as error:
                raise ValueError(str(error) if file.path in str(error) else f"{file.path}: {error}") from None
            for row in kept:
                name = str(row) if isinstance(row, BadSample) else row.key
                times[name] += 1
                if times[name] == 1:
                    found.append(row)
                elif isinstance(row, Sample):
                    found.append(replace(row, key=f"{name}#{times[name]}"))
    return found


def _files(source: Source) -> list[Source]:
    """The files that a path stands for, each with its own rule and weight."""
    if not re.search(r"\.ya?ml$|\{.+\}", source.path):
        return [source]
    return [
        source.model_copy(
            update={
                "path": part.path,
                "rule": source.rule if part.rule == "all" else part.rule,
                "weight": part.weight * source.weight,
            }
        )
        for part in parts(source.path)
    ]


def mix(rows: Sequence[Row], rule: str, seed: int = 0) -> list[Row]:
    """The rows that a rule keeps, in file order: "all", "first:N", "end:N" or "random:N"; N may be "N%", rounded up.

    "N%" alone is random. More rows than there are keeps all. Raises ValueError for any other rule. Source:
    heliossun/Structure-Policy-Optimization c54303c, train_spo.py:1013-1074, whose draw is not seeded.
    """
    if rule == "all":
        return list(rows)
    match = _RULE.fullmatch(rule.strip())
    if not match or not (match[1] or match[3]) or (not match[3] and "." in match[2]):
        raise ValueError(f"mixing rule {rule!r}: expected all, first:N, end:N, random:N (N a count or N%) or N%")
    count = math.ceil(len(rows) * float(match[2]) / 100) if match[3] else int(match[2])
    count = min(count, len(rows))
    if match[1] == "first":
        return list(rows[:count])
    if match[1] == "end":
        return list(rows[len(rows) - count :])
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def repeat(rows: Sequence[Row], weight: float, seed: int = 0) -> list[Row]:
    """The rows, `weight` times over; a part of a time is a random choice that `seed` fixes, in file order."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight {weight}: expected a finite number, 0 or more")
    whole, part = divmod(weight, 1)
    return [*list(rows) * int(whole), *mix(rows, f"random:{round(part * len(rows))}", seed)]


def parts(path: str | Path) -> list[Part]:
    """The files of a mixture. path: a YAML file with datasets: [{json_path, sampling_strategy: all, weight: 1}], or
    "folder/{a,b}.json" for several whole files.

    Raises ValueError naming the file and the entry for anything else.
    """
    braces = re.fullmatch(r"(.*)\{(.+)\}(.*)", str(path))
    if braces:
        return [Part(f"{braces[1]}{name.strip()}{braces[3]}") for name in braces[2].split(",")]
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    listed = tree.get("datasets") if isinstance(tree, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: expected datasets: [{{json_path, sampling_strategy}}, ...]")
    return [_part(entry, f"{path}: datasets.{place}") for place, entry in enumerate(listed)]


def _part(entry: object, where: str) -> Part:
    if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
        raise ValueError(f"{where}: expected json_path: a path")
    if unknown := entry.keys() - {"json_path", "sampling_strategy", "weight"}:
        raise ValueError(f"{where}: unknown key {sorted(map(str, unknown))[0]}")
    part = Part(entry["json_path"], str(entry.get("sampling_strategy", "all")), entry.get("weight", 1.0))
    if isinstance(part.weight, bool) or not isinstance(part.weight, int | float):
        raise ValueError(f"{where}.weight: expected a number, got {part.weight!r}")
    try:
        mix([], part.rule)
        repeat([], part.weight)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return part
