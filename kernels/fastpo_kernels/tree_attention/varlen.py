"""tree_attention as one variable-length flash attention call, in which ancestors' keys are gathered per segment."""

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fastpo_kernels.types import Plan


def runs(q: Tensor) -> bool:
    """Flash attention's own limits: fp16 or bf16, sm_80 and later, head size a multiple of 8 up to 256."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None) -> Tensor:
    """See tree_attention. Keys of a prompt with R responses are gathered R + 1 times."""
    return _flash()(q, k.index_select(0, plan.kv), v.index_select(0, plan.kv), plan, scale)


@cache
def _flash() -> Callable[[Tensor, Tensor, Tensor, Plan, float | None], Tensor]:
    """flash-attn (2.1 and later: causal is bottom-right aligned) where it imports, else torch's own kernel."""
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return _torch_varlen
    return lambda q, k, v, plan, scale: flash_attn_varlen_func(
        q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, softmax_scale=scale, causal=True
    )


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # not in torch 2.11
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    causal = (-1, 0)
    return varlen_attn(
        q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, scale=scale, window_size=causal, **options
    )  # pyright: ignore[reportReturnType]  # a tuple only when return_aux is given
