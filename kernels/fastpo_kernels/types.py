"""Small typed values that cross the package's borders.

Axes: N supervised tokens, T packed tokens, G segments, S responses, P prompts, K pairs, U units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """What the vocabulary axis is reduced to, in nats. A NamedTuple, since ZeRO-3's hooks look into tuples."""

    logp: Tensor  # [N] log p(target), gradient
    ref_logp: Tensor | None = None  # [N] no gradient
    kl: Tensor | None = None  # [N] KL(reference || policy), gradient; 0 where not asked for
    entropy: Tensor | None = None  # [N] no gradient


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

        pairs: "all" pairs of one prompt with different scores, in index order, or only its first best against its last worst.
        Raises ValueError where the counts do not add up.
        """
        tokens, groups = (torch.as_tensor(x, dtype=torch.int64) for x in (tokens, groups))
        score = torch.as_tensor(score)
        num_responses, num_tokens = int(groups.sum()), int(tokens.sum())
        if len(tokens) != num_responses or score.shape != (num_responses,):
            raise ValueError(
                f"groups count {num_responses} responses, tokens has {len(tokens)}, score has shape {tuple(score.shape)}"
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
        moved = {f: getattr(self, f) for f in self.__dataclass_fields__}
        return Segments(**{f: x if x is None else x.to(device) for f, x in moved.items()})


def _pairs(groups: list[int], score: list[float], which: str) -> Tensor:
    found, first = [], 0
    for size in groups:
        members = range(first, first + size)
        if which == "best_worst":
            best = max(members, key=lambda i: score[i], default=None)
            worst = min(reversed(members), key=lambda i: score[i], default=None)
            candidates = [(best, worst)] if size else []
        else:
            candidates = [(i, j) for i in members for j in members if i < j]
        ordered = [(i, j) if score[i] > score[j] else (j, i) for i, j in candidates]
        found += [(i, j) for i, j in ordered if score[i] != score[j]]
        first += size
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T.contiguous()


@dataclass(frozen=True, slots=True)
class Tree:
    """Forest of segments of one packed row. A segment attends to its ancestors and, causally, to itself."""

    start: Tensor  # [G + 1] segment g is tokens start[g]:start[g + 1]
    parent: Tensor  # [G] an earlier segment, -1 for a root

    def to(self, device: torch.device | str) -> "Tree":
        return Tree(self.start.to(device), self.parent.to(device))
