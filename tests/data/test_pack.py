"""The plan of a step and the packed row itself."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpo.data import loader
from fastpo.data.pack import bins, pack, plan, spread
from fastpo.sample import Encoded, Size
from tests import tiny


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 5))
def test_plan_holds_every_sample_once_within_budget_and_equal_on_all_ranks(lengths, ranks):
    ranked = plan([Size(n) for n in lengths], budget=Size(100), ranks=ranks)
    assert sorted(i for rows in ranked for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 100 for rows in ranked for row in rows)
    assert len({len(rows) for rows in ranked}) == 1 and len(ranked) == ranks


def test_spread_is_longest_first_and_bins_are_first_fit_decreasing():
    assert spread([3, 9, 4, 5], 2) == [[1], [3, 2, 0]] or spread([3, 9, 4, 5], 2) == [[1, 0], [3, 2]]
    assert bins([Size(n) for n in (6, 5, 4, 3, 2)], Size(10)) == [[0, 2], [1, 3, 4]]


def test_rows_hold_no_more_patches_than_the_tower_may_read_at_once():
    sizes = [Size(6, 10), Size(5, 90), Size(4, 95), Size(3, 0), Size(2, 5)]
    assert bins(sizes, Size(100, 100)) == [[0, 1, 3], [2, 4]]


def test_ranks_are_balanced_by_the_work_of_tower_and_language_model():
    sizes = [Size(100, 0), Size(10, 900), Size(50, 400), Size(50, 400)]
    assert plan(sizes, budget=Size(1000, 10_000), ranks=2, patch_cost=0.1) == [[[0, 2]], [[3, 1]]]
    assert plan(sizes, budget=Size(1000, 10_000), ranks=2) == [[[0, 1]], [[2, 3]]]


def test_packed_row_token_by_token():
    generator = torch.Generator().manual_seed(3)
    a = tiny.sample("a", generator, before=2, after=1, frames=1, responses=[2, 3])
    b = tiny.sample("b", generator, before=3, after=0, frames=0, responses=[1])
    batch = pack([a, b], tiny.blank())
    prompt = len(a.prompt)
    assert batch.ids.tolist() == [
        *a.prompt.tolist(),
        *a.responses[0],
        *a.responses[1],
        *b.prompt.tolist(),
        *b.responses[0],
    ]
    want = [*range(prompt), prompt, prompt + 1, prompt, prompt + 1, prompt + 2, 0, 1, 2, 3]
    assert batch.positions.tolist() == want
    assert batch.tree.parent.tolist() == [-1, 0, 0, -1, 3]
    assert batch.tree.start.tolist() == [0, prompt, prompt + 2, prompt + 5, prompt + 8, prompt + 9]
    assert batch.at.tolist() == [prompt - 1, prompt, prompt - 1, prompt + 2, prompt + 3, prompt + 7]
    assert batch.target.tolist() == [*a.responses[0], *a.responses[1], *b.responses[0]]
    assert batch.segments.pairs.tolist() == [[0], [1]]
    assert torch.equal(batch.segments.weight, torch.cat([*a.weights, *b.weights]))
    assert batch.keys == ("a", "b")


@pytest.mark.parametrize("texts", [0, 2])
def test_a_row_without_media_gets_one_blank_frame_without_targets(texts):
    generator = torch.Generator().manual_seed(4)
    samples = [tiny.sample(str(i), generator, before=3, after=1, frames=0, responses=[2, 2]) for i in range(texts)]
    batch = pack(samples, tiny.blank())
    visual = batch.ids == tiny.VIDEO
    assert int(visual.sum()) == 20 and batch.pixels.shape[0] == 1
    assert not visual[batch.at].any() and len(batch.target) == 4 * texts
    assert len(batch.segments.groups) == texts
    assert len(batch.segments.weight) == len(batch.better) == 4 * texts


def test_steps_cover_every_epoch_once_and_need_no_state():
    count, prompts = 10, 4
    epoch = [loader.step_samples(count, s, prompts=prompts, seed=7) for s in range(3)]
    assert [len(step) for step in epoch] == [4, 4, 2]
    assert sorted(sum(epoch, [])) == list(range(count))
    again = loader.step_samples(count, 3, prompts=prompts, seed=7)
    assert again != epoch[0] and again == loader.step_samples(count, 3, prompts=prompts, seed=7)
    assert loader.step_samples(count, 0, prompts=prompts, seed=8) != epoch[0]


def test_a_tree_of_depth_two_with_untrained_tokens():
    """prompt (3 tokens) -> question -> two answers; a token of the question and one of an answer are not trained."""
    sample = Encoded(
        key="a",
        prompt=torch.tensor([1, 2, 3]),
        responses=(torch.tensor([11, 12]), torch.tensor([21, 22, 23]), torch.tensor([31])),
        weights=(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]), torch.tensor([6.0])),
        scores=(0.0, 1.0, 0.0),
        parents=(-1, 0, 0),
        trained=(torch.tensor([True, False]), torch.tensor([False, True, True]), torch.tensor([True])),
    )
    batch = pack([sample], tiny.blank())
    assert batch.tree.parent.tolist()[:4] == [-1, 0, 1, 1]
    assert batch.positions.tolist()[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 5]
    assert batch.at.tolist() == [2, 5, 6, 4] and batch.target.tolist() == [11, 22, 23, 31]
    assert batch.segments.tokens.tolist() == [1, 2, 1] and batch.segments.weight.tolist() == [1, 4, 5, 6]


def test_positions_of_three_axes_continue_from_the_last_token():
    three = tiny.sample("a", torch.Generator().manual_seed(1), before=2, after=1, frames=1, responses=[2])
    grid = torch.stack([torch.arange(23) % 7, torch.arange(23) % 5, torch.arange(23) % 3])
    text = tiny.sample("b", torch.Generator().manual_seed(2), before=2, after=0, frames=0, responses=[1])
    batch = pack([replace(three, positions=grid, grid=torch.tensor([[1, 4, 4]])), text], tiny.blank())
    assert batch.positions.shape == (3, 28) and torch.equal(batch.positions[:, :23], grid)
    assert batch.positions[:, 23:].tolist() == [[3, 4, 0, 1, 2]] * 3
    assert batch.grid.tolist() == [[1, 4, 4]]
