"""Small typed values that cross the package's borders.

Axes: N supervised tokens, T packed tokens, G segments, S responses, P prompts, K pairs, U units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """What the vocabulary axis is reduced to, in nats. A NamedTuple, since ZeRO-3's hooks look into tuples."""

    logp: Tensor  # [N] log p(target), gradient
    ref_logp: Tensor | None = None  # [N] no gradient
    kl: Tensor | None = None  # [N] KL(reference || policy), gradient; 0 where not asked for
    entropy: Tensor | None = None  # [N] no gradient
    reverse_kl: Tensor | None = None  # [N] KL(policy || reference), gradient; 0 where not asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOut:
    """losses: [U], not reduced. metrics: detached vectors to be averaged."""

    losses: Tensor
    unit: Literal["token", "response", "prompt", "pair"]
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Ragged index token -> response -> prompt, prompt-major. Built on the CPU, so that no loss syncs."""

    tokens: Tensor  # [S] supervised tokens of each response
    owner: Tensor  # [N] response of each token
    groups: Tensor  # [P] responses of each prompt
    prompt: Tensor  # [S] prompt of each response
    score: Tensor  # [S] rank, IoU or reward; higher is better
    pairs: Tensor  # [2, K] (better, worse) responses of one prompt, ties left out
    weight: Tensor | None = None  # [N] RRPO phrase weights

    @classmethod
    def build(
        cls,
        *,
        tokens: Sequence[int] | Tensor,
        groups: Sequence[int] | Tensor,
        score: Sequence[float] | Tensor,
        weight: Tensor | None = None,
        pairs: Literal["all", "best_worst"] = "all",
    ) -> "Segments":
        """tokens: [S] counts; groups: [P] counts; score: [S]; weight: [N] or None.

        pairs: "all" pairs of one prompt with different scores, in index order, or only its first best against its
        last worst. Raises ValueError where the counts do not add up.
        """
        tokens, groups = (torch.as_tensor(x, dtype=torch.int64) for x in (tokens, groups))
        score = torch.as_tensor(score)
        num_responses, num_tokens = int(groups.sum()), int(tokens.sum())
        if len(tokens) != num_responses or score.shape != (num_responses,):
            raise ValueError(
                f"groups count {num_responses} responses, tokens has {len(tokens)}, score has {tuple(score.shape)}"
            )
        if weight is not None and weight.shape != (num_tokens,):
            raise ValueError(f"weight has shape {tuple(weight.shape)}, tokens add up to {num_tokens}")
        device = score.device
        return cls(
            tokens=tokens.to(device),
            owner=torch.repeat_interleave(torch.arange(num_responses), tokens.cpu()).to(device),
            groups=groups.to(device),
            prompt=torch.repeat_interleave(torch.arange(len(groups)), groups.cpu()).to(device),
            score=score,
            pairs=_pairs(groups.tolist(), score.tolist(), pairs).to(device),
            weight=weight,
        )

    def sum(self, x: Tensor) -> Tensor:
        """[N] per token -> [S] per response."""
        return x.new_zeros(len(self.tokens)).index_add(0, self.owner, x)

    @property
    def better(self) -> Tensor:
        """[N] bool: tokens of responses that are the better side of a pair (where RRPO wants the KL)."""
        wanted = torch.zeros(len(self.tokens), dtype=torch.bool, device=self.owner.device)
        wanted[self.pairs[0]] = True
        return wanted[self.owner]

    def to(self, device: torch.device | str) -> "Segments":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in tensors.items() if x is not None})


def _pairs(groups: list[int], score: list[float], which: str) -> Tensor:
    found, first = [], 0
    for size in groups:
        members = range(first, first + size)
        if which == "best_worst":
            by_score = score.__getitem__
            candidates = [(max(members, key=by_score), min(reversed(members), key=by_score))] if size else []
        else:
            candidates = [(i, j) for i in members for j in members if i < j]
        ordered = [(i, j) if score[i] > score[j] else (j, i) for i, j in candidates]
        found += [(i, j) for i, j in ordered if score[i] != score[j]]
        first += size
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T.contiguous()


class Plan(NamedTuple):
    """Where each segment of a Tree finds its keys: the tokens of its ancestors, root first, then its own."""

    kv: Tensor  # [sum of key counts] int64, the packed token of each gathered key
    cu_q: Tensor  # [G + 1] int32, cu_seqlens of the queries
    cu_k: Tensor  # [G + 1] int32, cu_seqlens of the gathered keys
    max_q: int
    max_k: int
    spans: tuple[tuple[tuple[int, int], ...], ...]  # host copy: (first, stop) of each ancestor, then of the segment


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """Forest of segments of one packed row. A segment attends to its ancestors and, causally, to itself.

    Build it on the CPU and move it with `.to`: the plan is computed once here and its host numbers survive the move,
    so that no layer syncs. Raises ValueError unless start ascends from 0 and every parent is an earlier segment.
    """

    start: Tensor  # [G + 1] int64, segment g is tokens start[g]:start[g + 1]; equal neighbours are an empty segment
    parent: Tensor  # [G] int64, an earlier segment, -1 for a root
    plan: Plan = field(default=None, repr=False)  # pyright: ignore[reportAssignmentType]  # filled in below

    def __post_init__(self) -> None:
        if self.plan is None:
            object.__setattr__(self, "plan", _plan(self.start, self.parent))

    def to(self, device: torch.device | str) -> "Tree":
        plan = self.plan
        moved = plan._replace(kv=plan.kv.to(device), cu_q=plan.cu_q.to(device), cu_k=plan.cu_k.to(device))
        return Tree(self.start.to(device), self.parent.to(device), moved)


def _plan(start: Tensor, parent: Tensor) -> Plan:
    first, up = start.tolist(), parent.tolist()
    if len(first) != len(up) + 1 or first[0] != 0 or any(a > b for a, b in pairwise(first)):
        raise ValueError(f"start must ascend from 0 and hold one number more than parent, got {first} and parent {up}")
    spans: list[tuple[tuple[int, int], ...]] = []
    for g, p in enumerate(up):
        if not -1 <= p < g:
            raise ValueError(f"parent of segment {g} is {p}; it must be an earlier segment, or -1 for a root")
        spans.append((*(spans[p] if p >= 0 else ()), (first[g], first[g + 1])))
    keys = [sum(b - a for a, b in chain) for chain in spans]
    rows = [torch.arange(a, b) for chain in spans for a, b in chain]
    return Plan(
        kv=torch.cat([torch.empty(0, dtype=torch.int64), *rows]).to(start.device),
        cu_q=start.to(torch.int32),
        cu_k=torch.tensor([0, *accumulate(keys)], dtype=torch.int32, device=start.device),
        max_q=max((b - a for a, b in pairwise(first)), default=0),
        max_k=max(keys, default=0),
        spans=tuple(spans),
    )
