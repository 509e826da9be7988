"""Resident memory while 1,000 clips are decoded in two worker processes: a decoder that leaks is seen.

`python -m bench.soak_decode [--clips 1000]`. Every clip is a file of its own; one of ten is cut and has to be skipped.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastpo.data import media, synthetic
from fastpo.models import images
from fastpo.sample import BadSample, Media

SIZE, FRAMES, KINDS = 112, 24, 10


def resident() -> float:
    """MB of this process that are in memory, its own pages (without shared libraries' files)."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * 4096 / 1e6


class Clips(Dataset):
    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[int, bool, float]:
        """(worker, whether the clip was refused, MB of the worker)."""
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        refused = False
        try:
            images.frames(media.decode(Media(kind="video", path=self.paths[i]), 16), 56)
        except BadSample:
            refused = True
        return worker.id, refused, resident()


def write(folder: Path, clips: int) -> list[Path]:
    """A few clips are encoded, the others are copies of them; each tenth is cut in the middle."""
    generator = np.random.default_rng(0)
    kinds = []
    for k in range(KINDS):
        path = folder / f"kind{k}.mp4"
        synthetic.encode(path, generator.integers(0, 256, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8))
        data = path.read_bytes()
        kinds.append(data[: len(data) // 2] if k == 0 else data)
    paths = [folder / f"{i}.mp4" for i in range(clips)]
    for i, path in enumerate(paths):
        path.write_bytes(kinds[i % KINDS])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), args.clips)
        begin, seen, refused = time.monotonic(), {0: [], 1: []}, 0
        for worker, bad, megabytes in DataLoader(Clips(paths), batch_size=None, num_workers=2, collate_fn=_same):
            seen[worker].append(megabytes)
            refused += bad
        seconds = time.monotonic() - begin
    for worker, held in seen.items():
        start, middle, end = held[len(held) // 20], held[len(held) // 2], held[-1]
        print(f"worker {worker}: {start:.1f} MB after 5 %, {middle:.1f} MB in the middle, {end:.1f} MB at the end")
    print(f"{args.clips} clips, {refused} refused, {seconds:.1f} s, {args.clips / seconds:.0f} clips/s, two workers")


def _same(row: Any) -> Any:
    return row


if __name__ == "__main__":
    main()
