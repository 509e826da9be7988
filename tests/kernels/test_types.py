import pickle

import pytest
import torch

from fastpo_kernels import Segments, Tree


def segments(**changes):
    given = {
        "tokens": [3, 0, 2, 1, 4],
        "groups": [2, 0, 3],
        "score": torch.tensor([0.25, 1.0, 0.5, 0.5, 0.0]),
        "weight": torch.arange(10.0),
    }
    return Segments.build(**(given | changes))


def test_segments_index_tokens_responses_and_prompts():
    seg = segments()
    assert seg.owner.tolist() == [0, 0, 0, 2, 2, 3, 4, 4, 4, 4]
    assert seg.prompt.tolist() == [0, 0, 2, 2, 2]
    assert seg.pairs.tolist() == [[1, 2, 3], [0, 4, 4]]  # the tie of responses 2 and 3 is no pair
    assert seg.better.tolist() == [False] * 3 + [True] * 3 + [False] * 4
    assert seg.sum(torch.arange(10, dtype=torch.float64)).tolist() == [3.0, 0.0, 7.0, 5.0, 30.0]
    assert seg.sum(torch.ones(10, dtype=torch.float64)).dtype == torch.float64


def test_best_worst_takes_the_first_best_and_the_last_worst():
    seg = segments(score=[1.0, 0.0, 2.0, 2.0, 2.0], pairs="best_worst")
    assert seg.pairs.tolist() == [[0], [1]]  # three equal scores are no pair
    seg = segments(tokens=[1, 1, 1, 1], groups=[4], score=[1.0, 0.0, 1.0, 0.0], weight=None, pairs="best_worst")
    assert seg.pairs.tolist() == [[0], [3]]


def test_segments_without_pairs():
    seg = segments(tokens=[2], groups=[1], score=[1.0], weight=None)
    assert seg.pairs.shape == (2, 0) and not seg.better.any()
    empty = segments(tokens=[], groups=[], score=[], weight=None)
    assert empty.sum(torch.zeros(0)).shape == (0,)


def test_segments_move_with_every_tensor():
    moved = segments().to("meta")
    assert {getattr(moved, name).device.type for name in moved.__slots__} == {"meta"}
    assert segments(weight=None).to("meta").weight is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": [3, 0, 2, 1]}, "5 responses, tokens has 4"),
        ({"score": torch.zeros(4)}, r"score has \(4,\)"),
        ({"weight": torch.zeros(9)}, "tokens add up to 10"),
    ],
)
def test_segments_refuse_counts_that_do_not_add_up(changes, message):
    with pytest.raises(ValueError, match=message):
        segments(**changes)


START, PARENT = torch.tensor([0, 5, 7, 7, 8, 11]), torch.tensor([-1, 0, 0, 1, -1])


def test_tree_plan_gathers_ancestors_then_own_tokens():
    plan = Tree(START, PARENT).plan
    prompt, first, third, other = [0, 1, 2, 3, 4], [5, 6], [7], [8, 9, 10]
    assert plan.kv.tolist() == prompt + prompt + first + prompt + prompt + first + third + other
    assert plan.cu_q.tolist() == START.tolist() and plan.cu_k.tolist() == [0, 5, 12, 17, 25, 28]
    assert (plan.cu_q.dtype, plan.cu_k.dtype, plan.kv.dtype) == (torch.int32, torch.int32, torch.int64)
    assert (plan.max_q, plan.max_k) == (5, 8)
    assert plan.spans[3] == ((0, 5), (5, 7), (7, 8))


def test_tree_plan_survives_a_move_and_a_worker_process():
    tree = Tree(START, PARENT)
    moved = tree.to("meta")  # a meta tensor has no numbers: the move cannot have read them back
    assert moved.plan.spans is tree.plan.spans and moved.plan.max_k == 8
    assert {x.device.type for x in (moved.start, moved.parent, *moved.plan[:3])} == {"meta"}
    assert pickle.loads(pickle.dumps(tree)).plan.kv.equal(tree.plan.kv)


def test_tree_without_segments():
    plan = Tree(torch.tensor([0]), torch.empty(0, dtype=torch.int64)).plan
    assert (plan.kv.tolist(), plan.cu_k.tolist(), plan.max_q, plan.max_k) == ([], [0], 0, 0)


@pytest.mark.parametrize(
    "start, parent, message",
    [
        ([1, 2, 3], [-1, 0], "ascend from 0"),
        ([0, 3, 2], [-1, 0], "ascend from 0"),
        ([0, 2], [-1, 0], "one number more"),
        ([], [], "one number more"),
        ([0, 2, 3], [-1, 1], "parent of segment 1 is 1"),
        ([0, 2, 3], [1, -1], "parent of segment 0 is 1"),
        ([0, 2, 3], [-1, -2], "parent of segment 1 is -2"),
    ],
)
def test_tree_refuses_what_is_no_forest(start, parent, message):
    with pytest.raises(ValueError, match=message):
        Tree(torch.tensor(start, dtype=torch.int64), torch.tensor(parent, dtype=torch.int64))
