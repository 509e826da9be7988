"""Checks of tree_attention's Triton kernels on the CPU, run by test_triton_tree_attention.py under TRITON_INTERPRET.

Triton reads that variable as it defines kernels, so that a process has either interpreted or compiled ones.
"""

import sys

import torch
from test_tree_attention import dense, inputs, tree, visible, with_gradients

from fastpo_kernels import Tree, tree_attention
from fastpo_kernels.testing import assert_no_worse, nan_scratch
from fastpo_kernels.tree_attention import launch

EPS = {torch.float32: 1e-6, torch.float16: 2e-3}
# 31 tokens make several blocks, some of several segments, some not full, and spans of whole tiles and a rest
SMALL = launch.Configs(launch.Config(8, 4, 4, 1), launch.Config(8, 4, 4, 1), launch.Config(4, 8, 4, 1))
CASES = [  # tree, dtype, heads, kv_heads, D, scale
    ("plain packing", torch.float16, 1, 1, 64, None),
    ("pairs", torch.float32, 1, 1, 80, 0.3),
    ("depth 3, empty segments", torch.float32, 2, 1, 64, None),
    ("depth 3, empty segments", torch.float16, 2, 1, 80, None),
]


def check(name, dtype, heads, kv_heads, size, scale) -> None:
    made, mask = inputs(name, heads, kv_heads, size, dtype), visible(name)

    def triton(q, k, v):
        strided = q.transpose(0, 1).contiguous().transpose(0, 1)
        return tree_attention(strided, k, v, tree(name), scale=scale, backend="triton")

    def definition(q, k, v):
        return dense(q, k, v, mask, scale)

    with nan_scratch():
        got = with_gradients(triton, *made)
    plain, exact = with_gradients(definition, *made), with_gradients(definition, *(x.double() for x in made))
    for what, *three in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert_no_worse(*three, eps=EPS[dtype], what=f"{name} {dtype} {heads}/{kv_heads} D={size}: {what}")


def check_values_and_gradients() -> None:
    """out, dq, dk and dv against the float64 definition."""
    for case in CASES:
        check(*case)


def check_no_tokens() -> None:
    q = torch.empty(0, 2, 64, requires_grad=True)
    none = Tree(torch.tensor([0]), torch.empty(0, dtype=torch.int64))
    out = tree_attention(q, q, q, none, backend="triton")
    out.sum().backward()
    assert out.shape == (0, 2, 64) and q.grad is not None


if __name__ == "__main__":
    torch.set_num_threads(1)
    # the attribute of that name is the function
    sys.modules["fastpo_kernels.tree_attention"].RUNS["triton"] = lambda q: True
    launch.FULL = SMALL
    launch.HALF = dict.fromkeys(launch.HALF, SMALL)
    for name in sys.argv[1:] or [name for name in globals() if name.startswith("check_")]:
        globals()[name]()
        print(name, flush=True)
