"""The built-in data sets: read by their formats, and no text says which answer is the better one."""

from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpo.config import Source
from fastpo.data import formats, tasks
from fastpo.data.synthetic import COLOURS
from fastpo.demo import TASKS, WARMUP
from fastpo.sample import Sample


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks") / "data"
    tasks.write(out, 0, train=5, test=1)
    return out


def samples(made: Path, name: str, split: str = "train") -> list[Sample]:
    kind = {task.data: task.format for task in (WARMUP, *TASKS.values())}[name]
    found = formats.samples(Source(name=kind, path=str(made / f"{name}_{split}.json")), made)
    assert all(isinstance(sample, Sample) for sample in found), found
    return found  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("name", tasks.ROWS)
def test_every_data_set_is_read_by_its_format(made, name):
    rows = {"warmup": 5}.get(name, 1) * 4
    assert len(samples(made, name, "test")) == rows
    assert len(samples(made, name)) == rows * (4 if name == "llava" else 5)


@pytest.mark.parametrize("name", ["dpo", "rrpo", "mia", "perpo", "ranked", "spo", "words"])
def test_text_alone_does_not_say_which_answer_is_better(made, name):
    """Of siblings in the tree, whatever stands before them, each wins as often as the other."""
    wins = Counter()
    for sample in samples(made, name):
        context = (sample.question, *(turn.text for turn in sample.turns))
        for better, worse in permutations(sample.responses, 2):
            if better.parent is not None and worse.parent is not None:
                before = sample.responses[better.parent].text, sample.responses[worse.parent].text
            else:
                before = ("", "") if better.parent is worse.parent is None else None
            if before is not None and before[0] == before[1] and better.score > worse.score:
                wins[(*context, before[0], better.text, worse.text)] += 1
    assert wins
    for (*before, better, worse), count in wins.items():
        assert wins[(*before, worse, better)] == count, (before, better, worse)


def test_the_pictures_say_which_is_better(made):
    """The most frequent colour of a still is that of its chosen answer, for answers of all kinds about one picture."""
    for name in ("words", "perpo", "ranked"):
        for sample in samples(made, name):
            pixels = np.asarray(Image.open(sample.media[0].path)).reshape(-1, 3).astype(int)
            seen = {c: (abs(pixels - rgb).max(1) < 30).sum() for c, rgb in COLOURS.items()}
            best = max(sample.responses, key=lambda response: response.score)
            assert max(seen, key=lambda c: seen[c]) in best.text


def test_labels_of_the_guessed_question_are_random_and_the_truth_is_balanced(made):
    guessed = [s for s in samples(made, "warmup") if tasks.CLASSIFY in s.question]
    truth = {sample.media[0].path: sample.truth for sample in samples(made, "visual_rft")}
    right = [s.responses[0].text in truth[s.media[0].path] for s in guessed]
    assert len(right) == 20 and 0 < sum(right) < 14
    assert all(count % 2 == 0 for count in Counter(truth.values()).values())


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tasks.write(tmp_path / name, seed, train=1, test=1)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 30
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert (tmp_path / "a/spo_train.json").read_bytes() != (tmp_path / "c/spo_train.json").read_bytes()
    with pytest.raises(ValueError, match="already there"):
        tasks.write(tmp_path / "a", 0, train=1, test=1)
