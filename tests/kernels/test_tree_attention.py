import pytest
import torch
import torch.nn.functional as F

from fastpo_kernels import Tree, tree_attention
from fastpo_kernels.testing import assert_no_worse
from fastpo_kernels.tree_attention import reference

TREES = {
    "plain packing": ([0, 7, 8, 19], [-1, -1, -1]),
    "pairs": ([0, 9, 12, 17, 24, 25, 31], [-1, 0, 0, -1, 3, 3]),
    "lists, some siblings in one call": ([0, 20, 23, 24, 28, 33, 40, 47, 49, 50], [-1, 0, 0, 0, 0, -1, 5, 6, 6]),
    "questions with answers": ([0, 30, 33, 35, 36, 36, 40, 42, 45, 45, 47], [-1, 0, 1, 1, 0, 0, 5, 5, 2, 8]),
    "depth 3, empty segments": ([0, 5, 5, 8, 11, 11, 18, 21], [-1, 0, 0, 2, 3, 3, 1]),
}


def tree(name):
    return Tree(*(torch.tensor(x) for x in TREES[name]))


def visible(name):
    """[T, T] bool: key j is j <= i in the segment of i, or anywhere in one of its ancestors."""
    start, parent = TREES[name]
    segment = [g for g in range(len(parent)) for _ in range(start[g], start[g + 1])]
    mask = torch.zeros(start[-1], start[-1], dtype=torch.bool)
    for i, g in enumerate(segment):
        ancestors, up = set(), parent[g]
        while up >= 0:
            ancestors.add(up)
            up = parent[up]
        for j, other in enumerate(segment):
            mask[i, j] = other in ancestors or (other == g and j <= i)
    return mask


def dense(q, k, v, mask, scale):
    """Attention with a full mask, from the formula."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def gathered(q, k, v, plan, scale):
    """What a varlen kernel does with the plan: per block, gathered keys and a bottom-right causal mask."""
    k, v = (x[plan.kv].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = []
    for g in range(len(plan.cu_q) - 1):
        (a, b), (c, d) = plan.cu_q[g : g + 2].tolist(), plan.cu_k[g : g + 2].tolist()
        assert b - a <= plan.max_q and d - c <= plan.max_k
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
        block = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        out.append(F.scaled_dot_product_attention(*block, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(out)


def inputs(name, heads, kv_heads, size, dtype, device="cpu"):
    torch.manual_seed(0)
    tokens = TREES[name][0][-1]
    made = [torch.randn(tokens, n, size, device=device) for n in (heads, kv_heads, kv_heads, heads)]
    return [x.to(dtype) for x in made]


def with_gradients(attend, q, k, v, g):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    out.backward(g)
    return out.detach(), q.grad, k.grad, v.grad


def assert_matches_dense(name, attend, made, scale, eps):
    q, k, v, g = made
    mask = visible(name).to(q.device)
    got = with_gradients(attend, q, k, v, g)
    plain = with_gradients(lambda *qkv: dense(*qkv, mask, scale), q, k, v, g)
    exact = with_gradients(lambda *qkv: dense(*qkv, mask, scale), *(x.double() for x in made))
    for what, *three in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert_no_worse(*three, eps=eps, what=what)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("heads, kv_heads, size", [(3, 3, 16), (6, 2, 64)])
@pytest.mark.parametrize("dtype, eps", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_reference_equals_dense_masked_attention(name, heads, kv_heads, size, dtype, eps, scale):
    made = inputs(name, heads, kv_heads, size, dtype)
    assert_matches_dense(name, lambda *qkv: tree_attention(*qkv, tree(name), scale=scale), made, scale, eps)


def test_siblings_share_a_call_while_their_ancestors_are_longer():
    found = [(len(ancestors), own) for ancestors, own in reference.runs(tree("lists, some siblings in one call").plan)]
    assert found == [
        (0, [(0, 20)]),
        (1, [(20, 23), (23, 24), (24, 28)]),  # 8 of at most 10 tokens
        (1, [(28, 33)]),
        (0, [(33, 40)]),
        (1, [(40, 47)]),  # has children of its own
        (2, [(47, 49), (49, 50)]),
    ]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("heads, kv_heads, size", [(3, 3, 16), (6, 2, 64)])
def test_varlen_plan_equals_dense_masked_attention(name, heads, kv_heads, size):
    made = inputs(name, heads, kv_heads, size, torch.float64)
    assert_matches_dense(name, lambda *qkv: gathered(*qkv, tree(name).plan, None), made, None, 1e-14)


def test_strided_heads_and_no_tokens():
    q, k, v, _ = inputs("pairs", 4, 2, 16, torch.float64)
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    torch.testing.assert_close(
        tree_attention(*strided, tree("pairs")), dense(q, k, v, visible("pairs"), None), rtol=1e-13, atol=1e-13
    )
    none = Tree(torch.tensor([0]), torch.empty(0, dtype=torch.int64))
    assert tree_attention(q[:0], k[:0], v[:0], none).shape == (0, 4, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[:-1], k[:-1], v[:-1]), "30 tokens, the tree 31"),
        (lambda q, k, v: (q, k[:-1], v[:-1]), r"k, v \[T, kv_heads, D\]"),
        (lambda q, k, v: (q, k, v[..., :8]), r"k, v \[T, kv_heads, D\]"),
        (lambda q, k, v: (q[:, :3], k, v), "3 query heads are not a multiple of 2"),
        (lambda q, k, v: (q, k.double(), v), "differ in dtype"),
        (lambda q, k, v: (q.to("meta"), k, v), "differ in device"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    q, k, v, _ = inputs("pairs", 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        tree_attention(*change(q, k, v), tree("pairs"))


@pytest.mark.parametrize(
    "backend, message", [("varlen", "cannot run on a cpu"), ("triton", "cannot run on a cpu"), ("flex", "is unknown")]
)
def test_refuses_a_backend_and_names_the_possible_ones(backend, message):
    q, k, v, _ = inputs("pairs", 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=f"'{backend}' {message}.*varlen, triton, reference.*usable here: reference"):
        tree_attention(q, k, v, tree("pairs"), backend=backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention has no CPU kernel")
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("heads, kv_heads, size", [(3, 3, 16), (6, 2, 64)])
@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_varlen_equals_dense_masked_attention(name, heads, kv_heads, size, dtype, eps):
    made = inputs(name, heads, kv_heads, size, dtype, "cuda")
    moved = tree(name).to("cuda")
    assert_matches_dense(name, lambda *qkv: tree_attention(*qkv, moved, backend="varlen"), made, None, eps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels need a CUDA device")
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("heads, kv_heads, size", [(3, 3, 16), (6, 2, 80), (4, 4, 128), (2, 1, 256)])
@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)])
def test_triton_equals_dense_masked_attention(name, heads, kv_heads, size, dtype, eps):
    made = inputs(name, heads, kv_heads, size, dtype, "cuda")
    moved = tree(name).to("cuda")
    assert_matches_dense(name, lambda *qkv: tree_attention(*qkv, moved, backend="triton"), made, None, eps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels need a CUDA device")
def test_triton_equals_varlen_on_a_long_prompt_and_repeats_itself():
    torch.manual_seed(0)
    long = Tree(torch.tensor([0, 3001, 3100, 4003, 4010]), torch.tensor([-1, 0, 0, 0])).to("cuda")
    q, k, v, g = (torch.randn(4010, n, 128, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2, 8))
    runs = {
        backend: with_gradients(lambda *qkv, b=backend: tree_attention(*qkv, long, backend=b), q, k, v, g)
        for backend in ("triton", "varlen")
    }
    exact = with_gradients(
        lambda *qkv: tree_attention(*qkv, long, backend="reference"), *(x.double() for x in (q, k, v, g))
    )
    for what, *three in zip(("out", "dq", "dk", "dv"), runs["triton"], runs["varlen"], exact, strict=True):
        assert_no_worse(*three, eps=8e-3, what=what)
    again = with_gradients(lambda *qkv: tree_attention(*qkv, long, backend="triton"), q, k, v, g)
    assert all(a.equal(b) for a, b in zip(again, runs["triton"], strict=True))
