"""The reference cache: what the loss needs of the frozen model, per sample, on disk.

One safetensors file per sample: `logp` [n] float32 of its supervised tokens and, for losses with a KL, `hidden` [m, H]
of the better responses' tokens. The folder is bound to one model and one way of encoding by fingerprint.json, a file to
its sample by its name.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastpo.config import Run
from fastpo.data.media import files_of
from fastpo.sample import Encoded, MicroBatch, Sample

BLOCK, BLOCKS = 1 << 16, 64  # bytes read per place and places per weight file: 4 MiB tell two checkpoints apart


def open_cache(run: Run, *, with_hidden: bool) -> Path:
    """The cache folder of this run. Raises ValueError where it was written for another model, encoding or loss."""
    folder = run.out / "reference"
    wanted = {
        "model": model_fingerprint(Path(run.model.path)),
        "dtype": run.model.dtype,
        "pooling": run.model.pooling,
        "frames": run.data.frames,
        "fps": run.data.fps,
        "hidden": with_hidden,
    }
    file = folder / "fingerprint.json"
    if file.exists():
        found = json.loads(file.read_text())
        changed = [key for key in wanted if found.get(key) != wanted[key]]
        if changed:
            raise ValueError(f"{folder}: stale reference cache, {', '.join(changed)} changed since; delete the folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=1))
    return folder


def model_fingerprint(folder: Path) -> str:
    """Hash of the configuration and of evenly spaced blocks of every weight file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for i in range(BLOCKS):
                handle.seek(max(0, (size - BLOCK)) * i // (BLOCKS - 1))
                digest.update(handle.read(BLOCK))
    return digest.hexdigest()


def sample_name(sample: Sample, encoded: Encoded) -> str:
    """File name bound to the tokens, the scores and the media files (path and size)."""
    digest = hashlib.sha256(repr([(str(f), f.stat().st_size) for m in sample.media for f in files_of(m)]).encode())
    digest.update(repr((encoded.prompt.tolist(), [r.tolist() for r in encoded.responses], encoded.scores)).encode())
    return digest.hexdigest()[:32] + ".safetensors"


def store(
    folder: Path, names: Mapping[str, str], batch: MicroBatch, logp: torch.Tensor, hidden: torch.Tensor | None
) -> None:
    """Writes one file per sample of the batch. logp: [N]; hidden: [N, H] or None."""
    owner = batch.segments.prompt[batch.segments.owner].cpu()
    for i, key in enumerate(batch.keys):
        tensors = {"logp": logp.cpu()[owner == i].float().contiguous()}
        if hidden is not None:
            tensors["hidden"] = hidden.cpu()[(owner == i) & batch.better].contiguous()
        target = folder / names[key]
        save_file(tensors, target.with_suffix(".tmp"))
        target.with_suffix(".tmp").rename(target)


def attach(folder: Path, names: Mapping[str, str], batch: MicroBatch) -> MicroBatch:
    """The batch with ref_logp [N] and, where cached, ref_hidden [N, H]. Raises ValueError for a sample not cached."""
    files = []
    for key in batch.keys:
        path = folder / names[key]
        if not path.exists():
            raise ValueError(f"{folder}: stale reference cache, it does not hold {key} as it is now; delete the folder")
        files.append(load_file(path))
    if not files:
        return replace(batch, ref_logp=torch.zeros(0))
    logp = torch.cat([f["logp"] for f in files])
    if "hidden" not in files[0]:
        return replace(batch, ref_logp=logp)
    rows = torch.cat([f["hidden"] for f in files])
    hidden = rows.new_zeros(len(batch.target), rows.shape[1])
    hidden[batch.better] = rows
    return replace(batch, ref_logp=logp, ref_hidden=hidden)
