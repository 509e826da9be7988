import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpo_kernels import Tree
from fastpo_kernels.tree_attention import work

HERE = Path(__file__).parent
CHECKS = HERE / "interpreted_tree_attention.py"
KERNELS = HERE.parents[1] / "kernels"
CPU = torch.device("cpu")


def test_interpreted_kernels_equal_the_definition():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, str(CHECKS)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == CHECKS.read_text().count("\ndef check_")


def random_forest(seed):
    """start, parent: up to 9 segments of up to 12 tokens, some empty, each below any earlier one or a root."""
    made = torch.Generator().manual_seed(seed)
    segments = int(torch.randint(1, 10, (), generator=made))
    lengths = torch.randint(0, 13, (segments,), generator=made)
    parent = torch.tensor([int(torch.randint(-1, g, (), generator=made)) if g else -1 for g in range(segments)])
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), parent


def visible(start, parent):
    """[T, T] bool: key j is j <= i in the segment of i, or anywhere in one of its ancestors."""
    mask = torch.zeros(int(start[-1]), int(start[-1]), dtype=torch.bool)
    for g in range(len(parent)):
        mask[start[g] : start[g + 1], start[g] : start[g + 1]] = True
        up = parent[g]
        while up >= 0:
            mask[start[g] : start[g + 1], start[up] : start[up + 1]] = True
            up = parent[up]
    return mask.tril()


def meetings(made, tokens, of_keys):
    """[T query, T key] number of times that the two meet, as the kernels read the blocks."""
    count, low = torch.zeros(tokens, tokens, dtype=torch.int64), made.low.tolist()
    for first, stop, first_span, stop_span in made.blocks.tolist():
        assert first < stop and first_span < stop_span
        for span in range(first_span, stop_span):
            for mine in range(first, stop):
                for other in range(*made.spans[span].tolist()):
                    query, key = (other, mine) if of_keys else (mine, other)
                    count[query, key] += span + 1 < stop_span or low[query] <= key <= query
    return count


@pytest.mark.parametrize("size", [1, 4, 16])
def test_blocks_meet_what_they_see_once(size):
    for seed in range(8):
        start, parent = random_forest(seed)
        seen, spans = visible(start, parent).long(), Tree(start, parent).plan.spans
        assert meetings(work.of_queries(spans, size, CPU), len(seen), False).equal(seen), f"{start}, {parent}"
        assert meetings(work.of_keys(spans, size, CPU), len(seen), True).equal(seen), f"{start}, {parent}"


def test_siblings_share_blocks_and_spans_are_joined():
    start = torch.tensor([0, 100, 103, 107, 110])
    spans = Tree(start, torch.tensor([-1, 0, 0, 0])).plan.spans
    queries = work.of_queries(spans, 64, CPU)
    assert queries.blocks[:, :2].tolist() == [[100, 110], [64, 100], [0, 64]]
    assert queries.spans.tolist() == [[0, 100], [100, 110], [0, 64], [64, 100], [0, 64]]
    keys = work.of_keys(spans, 64, CPU)
    assert keys.spans.tolist() == [[64, 110], [0, 64], [100, 110], [64, 100], [100, 110]]


def test_work_is_in_proportion_to_the_tokens():
    start = torch.tensor([0, 61_440, 63_488, 65_536])
    spans = Tree(start, torch.tensor([-1, 0, 0])).plan.spans
    for made in (work.of_queries(spans, 64, CPU), work.of_keys(spans, 64, CPU)):
        assert len(made.blocks) == 1024 and len(made.spans) <= 3 * 1024
