"""The language-model head as a module that returns per-token statistics instead of logits."""

import torch
from torch import Tensor, nn

from fastpo_kernels import TokenStats, token_stats


class StatsHead(nn.Module):
    """Shares the parameters of lm_head (and of the reference's head, where it has its own).

    A module of its own, since ZeRO-3 gathers the parameters that a module holds before its forward and its backward.
    """

    def __init__(self, lm_head: nn.Linear, ref_weight: nn.Parameter | None, backend: str, temperature: float):
        super().__init__()
        self.weight = lm_head.weight
        self.bias = lm_head.bias
        self.ref_weight = ref_weight
        self.backend = backend
        self.temperature = temperature

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        ref_hidden: Tensor | None = None,
        kl_rows: Tensor | None = None,
        reverse_kl: bool = False,
    ) -> TokenStats:
        """hidden, ref_hidden: [N, H]; target: [N] int64; kl_rows: [N] bool; reverse_kl: of all rows. Returns [N]
        statistics."""
        return token_stats(
            hidden,
            self.weight,
            target,
            ref_hidden=ref_hidden,
            ref_weight=None if ref_hidden is None else self.ref_weight,
            kl_rows=kl_rows,
            reverse_kl_rows=reverse_kl,
            bias=self.bias,
            backend=self.backend,
            temperature=self.temperature,
        )


class ValueHead(nn.Linear):
    """[n, H] -> [n] fp32, zero at first (wangclnlp/Vision-LLM-Alignment: v_head without a bias).

    In the model's dtype: ZeRO-3 takes one for all that it shards, and keeps fp32 master weights of its own. But not in
    its arithmetic: bf16 would round rewards to 8 bits, and 12.00 and 12.05 to one.
    """

    def __init__(self, size: int, dtype: torch.dtype):
        super().__init__(size, 1, bias=False, dtype=dtype)
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return input.float() @ self.weight[0].float()
