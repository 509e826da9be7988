"""The vocabulary axis, reduced to a few numbers per supervised token."""

from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo_kernels.dispatch import choose
from fastpo_kernels.token_stats import chunked, reference
from fastpo_kernels.token_stats.reference import Inputs
from fastpo_kernels.types import TokenStats

HAS_TRITON = find_spec("triton") is not None
RUNS = {  # best first; "triton" is behind "chunked" since it has not been measured
    "chunked": lambda hidden: True,
    "triton": lambda hidden: HAS_TRITON and hidden.is_cuda and hidden.dtype != torch.float64,
    "reference": lambda hidden: True,
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    kl_rows: Tensor | bool | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability, reference log-probability, KL and entropy of N tokens under a language-model head, in nats.

    The logits are softcap * tanh((h W^T + b) / softcap) / temperature, without the softcap where it is None, for the
    policy and the reference alike.

    hidden: [N, H] that predicts target: [N] int64 in [0, V); rows without supervision are the caller's to leave out.
    weight: [V, H]. bias: [V]. ref_hidden: [N, H]; ref_weight: [V, H], None where the reference uses weight (LoRA).
    One dtype of fp16, bf16, fp32, float64 and one device for all of them.
    kl_rows: [N] bool (on the CPU it saves a sync), or True for every row: where KL is wanted (RRPO: the better
    responses). None or False: nowhere.

    Returns, in fp32 (float64 for float64 inputs): logp [N]; ref_logp [N] where ref_hidden is given; kl [N] =
    KL(reference || policy) over the vocabulary, 0 in rows that did not ask, where kl_rows is given; entropy [N] of the
    policy. Gradients flow from logp and kl to hidden, weight and bias, never to or through the reference, also where it
    uses weight.

    backend: "reference" is the definition, with whole [N, V] logits; "chunked", which "auto" chooses, makes tiles of
    about 256 MB; "triton" (CUDA, not float64) is chunked with one kernel in place of the elementwise PyTorch on a tile,
    or, for small H and no unit gradient, logits that never leave the registers. Under a frozen weight and bias the
    forward of the latter two also computes the gradient of each row, so that the backward does not touch the weight,
    which may be partitioned away by then (ZeRO-3); under a trainable one the backward reads weight, bias and ref_weight
    again, which must be gathered by then.

    Raises ValueError for shapes, dtypes, devices and backends that do not fit, ref_weight or kl_rows without
    ref_hidden, and on the CPU for a target outside of [0, V); on CUDA that is a device-side assertion, without a sync.
    """
    if isinstance(kl_rows, bool):
        kl_rows = torch.ones(len(hidden), dtype=torch.bool) if kl_rows else None
    x = Inputs(hidden, weight, bias, target, ref_hidden, ref_weight, kl_rows, softcap, temperature)
    _check(x)
    name = choose(backend, hidden, RUNS)
    with torch.autocast(hidden.device.type, enabled=False):
        if name == "reference":
            return reference.stats(x)
        return _fused(_backend(name), x._replace(kl_rows=None if kl_rows is None else kl_rows.cpu()))


def _backend(name: str) -> ModuleType:
    if name == "chunked":
        return chunked
    from fastpo_kernels.token_stats import launch  # Triton is imported on first use

    return launch


def _fused(backend: ModuleType, x: Inputs) -> TokenStats:
    trains_head = any(t is not None and t.requires_grad for t in (x.weight, x.bias))
    unit_gradient = torch.is_grad_enabled() and x.hidden.requires_grad and not trains_head
    return TokenStats(*_Fused.apply(backend, unit_gradient, *x))  # pyright: ignore[reportGeneralTypeIssues]


class _Fused(torch.autograd.Function):
    """Keeps the head itself, not a saved copy of its data: under ZeRO-3 that is empty between forward and backward."""

    @staticmethod
    def forward(ctx: Any, backend: ModuleType, unit_gradient: bool, *args: Any) -> tuple[Tensor | None, ...]:
        x = Inputs(*args)
        stats, unit = backend.forward(x, unit_gradient)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in (stats.ref_logp, stats.entropy) if t is not None))
        ctx.backend, ctx.dtype = backend, x.hidden.dtype
        ctx.inputs = None
        if unit is not None:
            ctx.save_for_backward(*unit)
        else:
            ctx.save_for_backward(x.hidden, x.target, x.ref_hidden)
            ctx.inputs = x._replace(hidden=None, target=None, ref_hidden=None)  # pyright: ignore[reportArgumentType]
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        g_logp, _, g_kl, _ = grads
        hidden = weight = bias = None
        if ctx.inputs is None:
            hidden = chunked.unit_backward(chunked.UnitGradient(*ctx.saved_tensors), g_logp, g_kl).to(ctx.dtype)
        else:
            names = zip(("hidden", "target", "ref_hidden"), ctx.saved_tensors, strict=True)
            x = ctx.inputs._replace(**dict(names))
            with torch.autocast(x.hidden.device.type, enabled=False):
                hidden, weight, bias = ctx.backend.backward(x, g_logp, g_kl, ctx.needs_input_grad[2:5])
            weight, bias = (None if g is None else g.to(ctx.dtype) for g in (weight, bias))
        return None, None, hidden, weight, bias, *(None,) * (len(Inputs._fields) - 3)


def _check(x: Inputs) -> None:
    """Raises ValueError for arguments that do not fit."""
    if x.hidden.ndim != 2 or x.hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be [N, H] of {DTYPES}, got {list(x.hidden.shape)} of {x.hidden.dtype}")
    (rows, size), vocabulary = x.hidden.shape, len(x.weight) if x.weight.ndim else 0
    shapes = {"weight": (vocabulary, size), "bias": (vocabulary,), "target": (rows,), "ref_hidden": (rows, size)}
    shapes |= {"ref_weight": (vocabulary, size), "kl_rows": (rows,)}
    dtypes = {"target": torch.int64, "kl_rows": torch.bool}
    for name, shape in shapes.items():
        value, dtype = getattr(x, name), dtypes.get(name, x.hidden.dtype)
        if value is None:
            continue
        if tuple(value.shape) != shape:
            hint = "; a weight partitioned by ZeRO-3 must be gathered" if name.endswith("weight") else ""
            raise ValueError(f"{name} must be {list(shape)} beside this hidden, got {list(value.shape)}{hint}")
        if value.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} beside a hidden of {x.hidden.dtype}, got {value.dtype}")
        if value.device != x.hidden.device and not (name == "kl_rows" and value.device.type == "cpu"):
            raise ValueError(f"{name} is on {value.device}, hidden on {x.hidden.device}")
    if x.ref_hidden is None and (x.ref_weight is not None or x.kl_rows is not None):
        raise ValueError("ref_weight and kl_rows need ref_hidden")
    if (x.softcap is not None and not x.softcap > 0) or not x.temperature > 0:
        raise ValueError(f"softcap and temperature must be positive, got {x.softcap} and {x.temperature}")
    _check_target(x.target, vocabulary)


def _check_target(target: Tensor, vocabulary: int) -> None:
    inside = ((target >= 0) & (target < vocabulary)).all()
    message = f"target must lie in [0, {vocabulary}); leave rows without supervision out"
    if target.is_cuda:
        torch.ops.aten._assert_async.msg(inside, message)
    elif not inside:
        raise ValueError(f"{message}, got {int(target.min())} to {int(target.max())}")
