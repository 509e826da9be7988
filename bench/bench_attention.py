"""Attention of prompts with several responses, forward and backward: tree_attention against rows that repeat prompts.

A peer gets q, k and v in the layout in which its model would have them, a prompt once per response where it has rows.
Its results are brought into the packed order, and the gradients of copies summed, outside of the timing. The floor is
the six matrix products of scores, values and their gradients, by blocks of queries with the keys that they see.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import CUDA, DEVICE, Outputs, Variant
from fastpo_kernels import Tree, tree_attention


class Case(NamedTuple):
    prompts: int
    prompt: int  # tokens; 0: nothing is shared, plain packing
    responses: int  # of each prompt
    response: int  # tokens of the longest; the others are shorter by up to a third
    heads: int
    kv_heads: int
    D: int
    dtype: torch.dtype


QWEN = ((28, 4, 128), (16, 2, 128), (14, 2, 64))  # 7B, 3B, 0.5B
SHAPES = (
    (2, 6000, 2, 300),  # pairs about a short video
    (2, 2000, 8, 500),  # groups
    (1, 0, 16, 1000),
    (1, 30000, 2, 1000),  # a pair about a long video
)
GPU = [Case(*shape, *size, torch.bfloat16) for size in QWEN for shape in SHAPES]
CPU = [
    *(Case(*shape, 8, 2, 32, torch.float32) for shape in ((2, 400, 2, 40), (1, 256, 8, 40), (1, 0, 6, 120))),
    Case(1, 400, 2, 40, 4, 2, 64, torch.bfloat16),
]
BLOCK = 128  # queries of one product of the floor


class Layout(NamedTuple):
    tree: Tree
    at: Tensor  # [rows, L] packed place of each token of a prompt and one response, -1 for padding on the right
    own: Tensor  # [rows, L] bool: each packed place once


def name(case: Case) -> str:
    return "-".join(map(str, (*case[:-1], str(case.dtype)[6:])))


@pytest.mark.parametrize("case", GPU if CUDA else CPU, ids=name)
def bench_attention(case, benchmark, results):
    small = case._replace(prompt=min(case.prompt, 600), response=min(case.response, 130)) if CUDA else case
    tree, checked = _layout(case).tree, _variants(small)
    harness.compare(
        benchmark,
        results,
        "attention",
        {
            "prompts": f"{case.prompts} x {case.prompt}",
            "responses of each": f"{case.responses} x {case.response}",
            "heads": f"{case.heads}/{case.kv_heads}",
            "D": case.D,
            "dtype": str(case.dtype).removeprefix("torch."),
        },
        checked if small == case else _variants(case),
        exact=_exact(small),
        plain="padded rows, mask",
        tokens=int(tree.start[-1]),
        checked=None if small == case else checked,
        floor=_floor(case, tree),
    )


def _layout(case: Case) -> Layout:
    start, parent, rows = [0], [], []
    for _ in range(case.prompts):
        root, first = len(parent), start[-1]
        start.append(first + case.prompt)
        parent.append(-1)
        for i in range(case.responses):
            start.append(start[-1] + case.response - i * case.response // (3 * case.responses))
            parent.append(root)
            rows.append(torch.cat([torch.arange(first, first + case.prompt), torch.arange(*start[-2:])]))
    at = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    own = at >= 0
    for i in range(len(rows)):
        own[i, : case.prompt] = i % case.responses == 0
    return Layout(Tree(torch.tensor(start), torch.tensor(parent)).to(DEVICE), at.to(DEVICE), own.to(DEVICE))


def _inputs(case: Case, tokens: int) -> list[Tensor]:
    """q, k, v and the gradient of the result, [tokens, heads, D]."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [torch.randn(tokens, n, case.D, generator=generator, device=DEVICE).to(case.dtype) for n in heads]


def _variants(case: Case) -> dict[str, Variant | str]:
    layout = _layout(case)
    tree, at, own = layout
    inputs = _inputs(case, int(tree.start[-1]))
    backends = {"fastpo": "auto", **({"fastpo triton": "triton"} if CUDA else {})}
    found: dict[str, Variant | str] = {
        ours: _packed(inputs, lambda q, k, v, backend=backend: tree_attention(q, k, v, tree, backend=backend))
        for ours, backend in backends.items()
    }
    lengths = (at >= 0).sum(1).tolist()
    apart = [(at[i : i + 1, :n], own[i : i + 1, :n]) for i, n in enumerate(lengths)]
    mask = torch.ones(at.shape[1], at.shape[1], dtype=torch.bool, device=DEVICE).tril() & (at >= 0)[:, None, None]
    found["row by row, causal"] = _rows(inputs, apart, _causal)
    found["padded rows, causal"] = _rows(inputs, [(at, own)], _causal)
    found["padded rows, mask"] = _rows(inputs, [(at, own)], lambda q, k, v: _masked(q, k, v, mask))
    seen = _visible(layout)
    found["packed, dense mask"] = _packed(inputs, lambda q, k, v: _tokens_first(_masked, q, k, v, seen))
    if not CUDA:
        reason = "needs CUDA"
        return found | {"varlen, rows": reason, "flex_attention, packed": reason}
    ends = torch.tensor([0, *lengths]).cumsum(0)
    rows = Tree(ends, torch.full((len(lengths),), -1)).to(DEVICE)
    found["varlen, rows"] = _varlen(inputs, layout, rows)
    found["flex_attention, packed"] = _packed(inputs, _flex(tree))
    return found


def _packed(inputs: list[Tensor], attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Variant:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]

    def run() -> Outputs:
        out = attend(*leaves)
        return {"out": out.detach(), **_named(torch.autograd.grad(out, leaves, inputs[3]))}

    return Variant(run)


def _rows(
    inputs: list[Tensor],
    batches: list[tuple[Tensor, Tensor]],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Variant:
    """batches: (at, own) of Layout; attend: of [rows, heads, L, D]."""

    def laid(x: Tensor, at: Tensor) -> Tensor:
        return x[at.clamp(min=0)].transpose(1, 2).contiguous()

    leaves = [[laid(x, at).detach().requires_grad_() for x in inputs[:3]] for at, _ in batches]
    grads = [laid(inputs[3], at) * own[:, None, :, None] for at, own in batches]

    def run() -> list[tuple[Tensor, ...]]:
        outs = [attend(*batch) for batch in leaves]
        flat = torch.autograd.grad(outs, [x for batch in leaves for x in batch], grads)
        return [(out.detach(), *flat[3 * i : 3 * i + 3]) for i, out in enumerate(outs)]

    def read(found: list[tuple[Tensor, ...]]) -> Outputs:
        sums = [torch.zeros(x.shape, device=DEVICE) for x in (inputs[3], *inputs[:3])]
        for (at, own), batch in zip(batches, found, strict=True):
            for i, (total, x) in enumerate(zip(sums, batch, strict=True)):
                taken = own if i == 0 else at >= 0
                total.index_add_(0, at[taken], x.transpose(1, 2)[taken].float())
        out, *rest = (x.to(inputs[0].dtype) for x in sums)
        return {"out": out, **_named(rest)}

    return Variant(run, read)


def _varlen(inputs: list[Tensor], layout: Layout, rows: Tree) -> Variant:
    """The rows one after the other in one call of the varlen kernel, without padding."""
    own = layout.own[layout.at >= 0][None]
    at = layout.at[layout.at >= 0][None]
    return _rows(inputs, [(at, own)], lambda q, k, v: _heads_first(tree_attention, q, k, v, rows, backend="varlen"))


def _flex(tree: Tree) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = int(tree.start[-1])
    segment = torch.repeat_interleave(torch.arange(len(tree.parent), device=DEVICE), tree.start.diff())
    above = tree.parent[segment]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((segment[j] == segment[i]) | (segment[j] == above[i]))

    @cache
    def made() -> tuple:  # in the first call, so that a failure is a row
        blocks = create_block_mask(sees, None, None, tokens, tokens, device=DEVICE, _compile=True)
        return torch.compile(flex_attention, dynamic=False), blocks

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        compiled, blocks = made()
        return _tokens_first(compiled, q, k, v, block_mask=blocks, enable_gqa=True)

    return attend


def _tokens_first(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args, **options) -> Tensor:
    """[T, heads, D] of an attention over [1, heads, T, D]."""
    return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), *args, **options)[0].transpose(0, 1)


def _heads_first(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args, **options) -> Tensor:
    """[1, heads, T, D] of an attention over [T, heads, D]."""
    return attend(*(x[0].transpose(0, 1) for x in (q, k, v)), *args, **options).transpose(0, 1)[None]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """With repeated key heads, as transformers does it beside a mask."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _visible(layout: Layout) -> Tensor:
    """[T, T] bool, from the rows."""
    tokens = int(layout.tree.start[-1])
    seen = torch.zeros(tokens, tokens, dtype=torch.bool, device=DEVICE)
    for row in layout.at:
        at = row[row >= 0]
        seen[at[:, None], at] |= torch.ones(len(at), len(at), dtype=torch.bool, device=DEVICE).tril()
    return seen


def _exact(case: Case) -> Outputs:
    """By the formula, over all the packed tokens."""
    layout = _layout(case)
    *leaves, grad = (x.double() for x in _inputs(case, int(layout.tree.start[-1])))
    q, k, v = (x.requires_grad_() for x in leaves)
    keys, values = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, keys) * case.D**-0.5
    weights = scores.masked_fill(~_visible(layout), -torch.inf).softmax(-1)
    out = torch.einsum("hij,jhd->ihd", weights, values)
    return {"out": out.detach(), **_named(torch.autograd.grad(out, [q, k, v], grad))}


def _floor(case: Case, tree: Tree) -> Callable[[], None]:
    q, k, v, grad = _inputs(case, int(tree.start[-1]))
    blocks = []
    for spans in tree.plan.spans:
        keys, values = (torch.cat([x[a:b] for a, b in spans]).transpose(0, 1).contiguous() for x in (k, v))
        first, stop = spans[-1]
        for a in range(first, stop, BLOCK):
            b = min(a + BLOCK, stop)
            queries, grads = (  # heads of one key head as more queries
                x[a:b].reshape(b - a, case.kv_heads, -1, case.D).permute(1, 2, 0, 3).flatten(1, 2) for x in (q, grad)
            )
            n = keys.shape[1] - (stop - b)
            blocks.append((queries, keys[:, :n], values[:, :n], grads))

    def run() -> None:
        for queries, keys, values, grads in blocks:
            weights = queries @ keys.mT
            _ = weights @ values, weights.mT @ grads, grads @ values.mT, weights @ keys, weights.mT @ queries

    return run


def _named(grads) -> Outputs:
    return dict(zip(("d q", "d k", "d v"), grads, strict=True))
