"""Decoded pictures on disk: made once, never half, never stale, never more than allowed."""

import multiprocessing
import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastpo.config import load
from fastpo.data import cache
from fastpo.fit import make_feed
from fastpo.sample import BadSample, Media, Sample
from tests.test_fit import RECIPE, options


def sample(*paths: Path) -> Sample:
    return Sample(key="a", question="", media=tuple(Media(kind="image", path=p) for p in paths), responses=())


@pytest.fixture
def counted(tmp_path):
    """(file, pictures of samples from a cache of 10 KB beside it, the samples that were made)."""
    file, made = tmp_path / "a.png", []
    file.write_bytes(b"a")

    def make(s):
        made.append(s)
        data = b"".join(item.path.read_bytes() for item in s.media)
        return torch.tensor(list(data), dtype=torch.uint8).repeat(3, 1000 // max(1, len(data)))

    return file, partial(cache.pixels, make, tmp_path / "cache", 10_000), made


def test_made_once_and_again_for_another_file_or_setting(counted):
    file, pixels, made = counted
    first = pixels("facts", sample(file))
    assert torch.equal(pixels("facts", sample(file)), first) and len(made) == 1
    pixels("other facts", sample(file))
    assert len(made) == 2
    file.write_bytes(b"b")  # the same size, at another time
    os.utime(file, ns=(1, 1))
    assert pixels("facts", sample(file))[0, 0] == ord("b") and len(made) == 3
    pixels("facts", sample(file, file))
    assert len(made) == 4


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:5], lambda b: b"", lambda b: b[:-9] + bytes(9)])
def test_a_damaged_file_is_made_again_with_one_line_in_the_log(counted, caplog, damage):
    file, pixels, made = counted
    first = pixels("facts", sample(file))
    (held,) = (file.parent / "cache").iterdir()
    held.write_bytes(damage(held.read_bytes()))
    assert torch.equal(pixels("facts", sample(file)), first) and len(made) == 2
    assert len(caplog.messages) == 1 and f"{held}: damaged" in caplog.messages[0]
    assert torch.equal(pixels("facts", sample(file)), first) and len(made) == 2


def test_what_was_used_longest_ago_goes_first(counted):
    """3,000 bytes and a header each, of 10,000 bytes in all."""
    file, pixels, made = counted
    (file.parent / "cache").mkdir()
    left = file.parent / "cache" / f"{0:032x}.tmp"
    left.write_bytes(bytes(500))
    os.utime(left, ns=(0, 0))
    for i, name in enumerate("abcad"):
        pixels(name, sample(file))
        newest = max((file.parent / "cache").iterdir(), key=lambda f: f.stat().st_mtime_ns)
        os.utime(newest, ns=(i + 1, i + 1))
    assert len(made) == 4 and not left.exists()  # the second "a" was there
    for name, there in {"a": True, "d": True, "b": False}.items():
        before = len(made)
        pixels(name, sample(file))
        assert (len(made) == before) == there, name
    assert sum(f.stat().st_size for f in (file.parent / "cache").iterdir()) <= 10_000


def test_files_of_others_in_the_folder_stay(counted):
    file, pixels, _ = counted
    folder = file.parent / "cache"
    (folder / "nested").mkdir(parents=True)
    others = [folder / name for name in ("clip.mp4", "model.safetensors", "x.tmp")]
    for other in others:
        other.write_bytes(bytes(20_000))
        os.utime(other, ns=(0, 0))
    for name in "abcde":
        pixels(name, sample(file))
    assert all(other.exists() for other in others)
    assert len([f for f in folder.iterdir() if f not in others]) <= 4  # nested, and 3,000 bytes each of 10,000


def test_a_folder_that_is_a_file_is_refused(demo, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ValueError, match=r"data.cache: .*cache cannot be a folder"):
        make_feed(load(RECIPE, options(demo, tmp_path / "out", f"data.cache={tmp_path / 'cache'}")), 0, 1)


def test_samples_without_media_and_missing_files_are_left_to_the_decoder(counted):
    file, pixels, made = counted
    pixels("facts", sample())
    assert len(made) == 1
    with pytest.raises(FileNotFoundError):
        pixels("facts", sample(file.with_name("gone.png")))


def content(s: Sample) -> torch.Tensor:
    return torch.full((3, 1000), s.media[0].path.read_bytes()[0], dtype=torch.uint8)


def busy(folder: Path, seed: int) -> None:
    """Reads and writes 30 samples in a cache with room for 10, until it is killed."""
    chosen = torch.Generator().manual_seed(seed)
    while True:
        i = int(torch.randint(30, (), generator=chosen))
        found = cache.pixels(content, folder / "cache", 33_000, "facts", sample(folder / f"{i}.png"))
        assert found is not None and (found == i).all()
        (folder / f"done_{seed}").touch()


def test_several_workers_that_are_killed_leave_whole_files(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(bytes([i]))
    workers = [multiprocessing.get_context("fork").Process(target=busy, args=(tmp_path, seed)) for seed in range(6)]
    for worker in workers:
        worker.start()
    while len(list(tmp_path.glob("done_*"))) < len(workers):
        time.sleep(0.02)
    time.sleep(0.5)
    for worker in workers:
        assert worker.is_alive()
        worker.kill()
        worker.join()
    files = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        found = cache.read(file)
        assert found is not None and len(found["pixels"].unique()) == 1
    cache.clear(tmp_path / "cache", 33_000)
    assert sum(f.stat().st_size for f in (tmp_path / "cache").iterdir()) <= 33_000


def test_a_run_reads_what_another_one_decoded(demo, tmp_path):
    """The clips are garbage of the same size and time by then: 4 frames are cached, 3 are not."""
    folder = tmp_path / "demo"
    shutil.copytree(demo, folder)
    settings = [f"data.cache={tmp_path / 'cache'}", "data.workers=2", "model.family=llava_video"]

    def pixels(*more: str) -> list[torch.Tensor]:
        run = load(RECIPE, options(folder, tmp_path, *settings, *more))
        feed = make_feed(run, 0, 1)
        table = feed.read(run.data.train)
        return [batch.pixels for window in feed.windows(table, [[0, 1, 2], [3, 0]]) for batch in window]

    first = pixels()
    for clip in (folder / "videos").iterdir():
        stat = clip.stat()
        with clip.open("r+b") as file:
            file.seek(stat.st_size // 2)
            file.write(bytes(stat.st_size - stat.st_size // 2))
        os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for ours, theirs in zip(pixels(), first, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(BadSample):
        pixels("data.frames=3")
