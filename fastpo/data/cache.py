"""Tensors on disk that are made once: decoded pictures and visual features, for all workers, ranks and runs.

A file is written beside its place and renamed, so that a killed writer leaves no half file under a name that is read.
"""

import hashlib
import logging
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastpo.data.media import files_of
from fastpo.sample import Media, Sample

logger = logging.getLogger(__name__)

SPARE = 0.1  # of the limit that one clearing frees, so that not every write has to clear
OWN = re.compile(r"[0-9a-f]{32}\.(safetensors|tmp)")  # names of the files made here: a user may keep others beside them


def ready(folder: Path) -> None:
    """Makes the folder. Raises ValueError where nothing can be kept in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache: {folder} cannot be a folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"data.cache: {folder} cannot be written to")


def key(media: Sequence[Media], facts: str) -> str:
    """What the pixels of these files depend on: kind, path, size and time of change of each, and `facts`."""
    stats = [(m.kind, file, file.stat()) for m in media for file in files_of(m)]
    found = [(kind, str(file.resolve()), s.st_size, s.st_mtime_ns) for kind, file, s in stats]
    return hashlib.sha256(repr((found, facts)).encode()).hexdigest()[:32]


def pixels(
    make: Callable[[Sample], Tensor | None], folder: Path, limit: int, facts: str, sample: Sample
) -> Tensor | None:
    """make(sample), from the folder where it is there. limit: bytes; the files used longest ago go first.

    facts: what `make` depends on beside the media. Raises what `make` raises, and nothing of it is kept.
    """
    if not all(item.path.exists() for item in sample.media):
        return make(sample)  # which says what is missing
    file = folder / f"{key(sample.media, facts)}.safetensors"
    kept = found(file)
    if kept is not None:
        return kept["pixels"]
    made = make(sample)
    if made is not None and made.nbytes <= limit:
        write(file, {"pixels": made})
        clear(folder, limit)
    return made


def found(file: Path) -> dict[str, Tensor] | None:
    """What `read` returns, and the file counts as used now."""
    tensors = read(file)
    if tensors is not None:
        with suppress(FileNotFoundError):
            os.utime(file)
    return tensors


def read(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a file; None where there is none, or, with a line in the log, where it is damaged."""
    try:
        found = load(file.read_bytes())  # opened once: it may be cleared meanwhile
        if found.pop("crc").item() == _crc(found):
            return found
        reason = "its checksum differs"
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, RuntimeError, OSError) as error:
        reason = str(error)
    logger.warning("%s: damaged, it is made again: %s", file, reason)
    return None


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Two writers of one file write the same: the later one wins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{uuid4().hex}.tmp")
    beside.write_bytes(save({**tensors, "crc": torch.tensor(_crc(tensors))}))
    with suppress(FileNotFoundError):  # another worker cleared it, in a folder with room for next to nothing
        beside.rename(file)


def clear(folder: Path, limit: int) -> None:
    """Deletes what was used longest ago, also what killed writers left, until the cache is below its limit.

    Files of other names are neither counted nor touched.
    """
    files = []
    for entry in (entry for entry in os.scandir(folder) if OWN.fullmatch(entry.name)):
        with suppress(FileNotFoundError):  # another worker clears too
            stat = entry.stat()
            files.append((stat.st_mtime_ns, stat.st_size, entry.path))
    held = sum(size for _, size, _ in files)
    if held <= limit:
        return
    for _, size, path in sorted(files)[:-1]:  # not the one that was written last
        if held <= limit * (1 - SPARE):
            break
        Path(path).unlink(missing_ok=True)
        held -= size


def _crc(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes(), total)
    return total
