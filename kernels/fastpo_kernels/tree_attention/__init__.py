"""Attention over a forest of segments packed into one row."""

from torch import Tensor

from fastpo_kernels.dispatch import choose
from fastpo_kernels.tree_attention import reference, varlen
from fastpo_kernels.types import Tree

RUNS = {"varlen": varlen.runs, "reference": lambda q: True}  # best first
ATTEND = {"varlen": varlen.attend, "reference": reference.attend}


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Each token attends to all tokens of its segment's ancestors and to its own segment up to itself.

    q: [T, heads, D]; k, v: [T, kv_heads, D], heads a multiple of kv_heads (grouped query: head i reads kv head
    i // (heads / kv_heads)); one dtype and device. tree: of T tokens, on the same device. scale: None is D ** -0.5.
    Returns [T, heads, D] in the dtype of q. No object of size T x T is built.
    backend: "reference" runs anywhere; "varlen" runs fp16 and bf16 on CUDA (sm_80 and later, D a multiple of 8 up to
    256); "auto" is varlen where it runs, else reference. Raises ValueError for shapes, dtypes, devices and backends
    that do not fit.
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
