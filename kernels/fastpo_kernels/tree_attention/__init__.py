"""Attention over a forest of segments packed into one row."""

from importlib.util import find_spec

import torch
from torch import Tensor

from fastpo_kernels.dispatch import choose
from fastpo_kernels.tree_attention import reference, varlen
from fastpo_kernels.types import Plan, Tree

HAS_TRITON = find_spec("triton") is not None


def _triton_runs(q: Tensor) -> bool:
    return (
        HAS_TRITON
        and q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and q.shape[-1] % 16 == 0
        and 16 <= q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _triton(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None) -> Tensor:
    from fastpo_kernels.tree_attention import launch  # Triton is imported on first use

    return launch.attend(q, k, v, plan, scale)


# best first; "triton" is behind "reference", which runs everywhere, since it has not been measured
RUNS = {"varlen": varlen.runs, "reference": lambda q: True, "triton": _triton_runs}
ATTEND = {"varlen": varlen.attend, "reference": reference.attend, "triton": _triton}


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Each token attends to all tokens of its segment's ancestors and to its own segment up to itself.

    q: [T, heads, D]; k, v: [T, kv_heads, D], heads a multiple of kv_heads (grouped query: head i reads kv head
    i // (heads / kv_heads)); one dtype and device. tree: of T tokens, on the same device. scale: None is D ** -0.5.
    Returns [T, heads, D] in the dtype of q. No object of size T x T is built.
    backend: "reference" runs anywhere; "varlen" runs fp16 and bf16 on CUDA (sm_80 and later, D a multiple of 8 up to
    256) with the keys of ancestors gathered for each segment; "triton" (CUDA, sm_80 and later, not float64, D a
    multiple of 16 up to 256) reads them where they lie, and all its gradients are deterministic. "auto" is varlen where
    it runs, else reference: "triton" has been interpreted and compiled but never timed on a device, and so is only
    taken where it is asked for. Raises ValueError for shapes, dtypes, devices and backends that do not fit.
    """
    _check(q, k, v, tree)
    return ATTEND[choose(backend, q, RUNS)](q, k, v, tree.plan, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, tree: Tree) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or (len(q), q.shape[2]) != (len(k), k.shape[2]):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"expected q [T, heads, D] and k, v [T, kv_heads, D], got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    tokens = tree.plan.spans[-1][-1][1] if tree.plan.spans else 0
    if len(q) != tokens:
        raise ValueError(f"q holds {len(q)} tokens, the tree {tokens}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == tree.start.device:
        raise ValueError(f"q, k, v, tree differ in device: {q.device}, {k.device}, {v.device}, {tree.start.device}")
