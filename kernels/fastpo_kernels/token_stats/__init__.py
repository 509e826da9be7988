"""The vocabulary axis, reduced to a few numbers per supervised token."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo_kernels.dispatch import choose
from fastpo_kernels.token_stats import chunked, reference, trained
from fastpo_kernels.token_stats.reference import Inputs
from fastpo_kernels.token_stats.sharded import Shard, copied, gathered
from fastpo_kernels.token_stats.ways import capability, choose_way
from fastpo_kernels.types import TokenStats

__all__ = ["Shard", "folded_logp", "gathered", "token_stats"]

HAS_TRITON = find_spec("triton") is not None
RUNS = {  # "auto" is the first after that of ways.TABLE
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
    reverse_kl_rows: Tensor | bool | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    shard: Shard | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability, reference log-probability, KL and entropy of N tokens under a language-model head, in nats.

    The logits are softcap * tanh((h W^T + b) / softcap) / temperature, without the softcap where it is None, for the
    policy and the reference alike.

    hidden: [N, H] that predicts target: [N] int64 in [0, V); rows without supervision are the caller's to leave out.
    weight: [V, H]. bias: [V]. ref_hidden: [N, H]; ref_weight: [V, H], None where the reference uses weight (LoRA).
    One dtype of fp16, bf16, fp32, float64 and one device for all of them.
    kl_rows: [N] bool (on the CPU it saves a sync), or True for every row: where KL is wanted (RRPO: the better
    responses). None or False: nowhere. reverse_kl_rows: the same for the KL in the other direction.
    shard: weight, ref_weight and bias are this rank's part of a vocabulary split over a tensor-parallel group; V is the
    whole. Targets count over the whole vocabulary, the statistics are the same on every rank, the gradient of hidden is
    summed over the ranks, and those of weight and bias stay local. A head that FSDP2 has sharded goes through gathered.

    Returns, in fp32 (float64 for float64 inputs): logp [N]; ref_logp [N] where ref_hidden is given; kl [N] =
    KL(reference || policy) over the vocabulary, 0 in rows that did not ask, where kl_rows is given; entropy [N] of the
    policy; reverse_kl [N] = KL(policy || reference), like kl, where reverse_kl_rows is given. Gradients flow from logp,
    kl and reverse_kl to hidden, weight and bias, never to or through the reference, also where it uses weight.

    backend: "reference" is the definition, with whole [N, V] logits; "chunked" makes tiles of at most 256 MB; "triton"
    (CUDA, not float64) is chunked with one kernel in place of the elementwise PyTorch on a tile, or, for small H, no
    unit gradient and no reverse KL, logits that never leave the registers. "auto" is "triton" on devices of capability
    8.x and 9.x, else "chunked": the table of `ways`, a paper analysis, since none was timed on a GPU. Only "chunked"
    takes a shard. Under a frozen weight and bias the forward of "chunked" and "triton" also computes the gradient of
    each row, so that the backward does not touch the weight, which may be partitioned away by then (ZeRO-3); under a
    trainable one the backward reads weight, bias and ref_weight again, which must be gathered by then.

    Raises ValueError for shapes, dtypes, devices and backends that do not fit, ref_weight, kl_rows or reverse_kl_rows
    without ref_hidden, and on the CPU for a target outside of [0, V); on CUDA that is a device-side assertion, without
    a sync.
    """
    kl_rows, reverse_kl_rows = _mask(kl_rows, len(hidden)), _mask(reverse_kl_rows, len(hidden))
    x = Inputs(
        hidden, weight, bias, target, ref_hidden, ref_weight, kl_rows, softcap, temperature, reverse_kl_rows, shard
    )
    _check(x)
    lacking = {"triton", "reference"} if shard is not None else set()
    if backend in lacking:
        raise ValueError(f"backend {backend!r} has no shard; use 'chunked'")
    unit_gradient = _wants_unit_gradient(x)
    way = choose_way(capability(hidden.device), hidden.shape[1], hidden.dtype, unit_gradient)
    names = ("chunked" if way == "chunked" else "triton", *RUNS)
    name = choose(backend, hidden, {name: RUNS[name] for name in names if name not in lacking})
    with torch.autocast(hidden.device.type, enabled=False):
        if name == "reference":
            return reference.stats(x)
        x = x._replace(**{k: v.cpu() for k, v in _rows(x).items()})
        x = x if shard is None else x._replace(hidden=copied(hidden, shard))
        return TokenStats(*_Fused.apply(_backend(name), unit_gradient, *x))  # pyright: ignore[reportGeneralTypeIssues]


def folded_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of losses that each need only their own token's log-probability: 3 GEMM passes under a trainable head.

    coefficient(logp [n], rows: slice of N) -> (loss [n], d loss / d logp [n]) is called without a graph, once per chunk
    of rows and in their order. SFT: (-logp / N, -1 / N). GRPO and PPO: the clipped ratio to a given old_logp and its
    derivative. DPO of one pair: (m logp, m) with m = 1 for chosen tokens and -1 for rejected ones gives the pair's
    scalar, whose loss is then an ordinary function of the result.

    The other arguments are those of token_stats, which runs "chunked". The forward computes all gradients; the backward
    multiplies them by that of the result and touches no weight (ZeRO-3). In between, the gradient of weight stays in
    the fp32 in which chunks are summed. A row with a coefficient of exactly 0 (clipped, no advantage) enters no
    gradient GEMM; finding those costs a sync per chunk.

    Returns the loss, a scalar with gradient, and logp [N] without, both in fp32 (float64 for float64). Raises
    ValueError as token_stats does, and where coefficient does not return two [n].
    """
    x = Inputs(hidden, weight, bias, target, None, None, None, softcap, temperature, None, shard)
    _check(x)
    with torch.autocast(hidden.device.type, enabled=False):
        x = x if shard is None else x._replace(hidden=copied(hidden, shard))
        wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in x[:3]]
        return _Folded.apply(coefficient, wanted, *x)  # pyright: ignore[reportReturnType]


def _mask(rows: Tensor | bool | None, size: int) -> Tensor | None:
    if isinstance(rows, bool):
        return torch.ones(size, dtype=torch.bool) if rows else None
    return rows


def _rows(x: Inputs) -> dict[str, Tensor]:
    """The masks of x that are given."""
    masks = {"kl_rows": x.kl_rows, "reverse_kl_rows": x.reverse_kl_rows}
    return {name: rows for name, rows in masks.items() if rows is not None}


class _Backend(NamedTuple):
    forward: Callable[[Inputs, bool], chunked.Forward]
    d_logits: trained.DLogits


def _backend(name: str) -> _Backend:
    if name == "chunked":
        return _Backend(chunked.forward, trained.d_logits)
    from fastpo_kernels.token_stats import launch  # Triton is imported on first use

    return _Backend(launch.forward, launch.d_logits)


def _wants_unit_gradient(x: Inputs) -> bool:
    trains_head = any(t is not None and t.requires_grad for t in (x.weight, x.bias))
    return torch.is_grad_enabled() and x.hidden.requires_grad and not trains_head


class _Fused(torch.autograd.Function):
    """Keeps the head itself, not a saved copy of its data: under ZeRO-3 that is empty between forward and backward."""

    @staticmethod
    def forward(ctx: Any, backend: _Backend, unit_gradient: bool, *args: Any) -> tuple[Tensor | None, ...]:
        x = Inputs(*args)
        stats, unit, normalisers = backend.forward(x, unit_gradient)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in (stats.ref_logp, stats.entropy) if t is not None))
        ctx.backend, ctx.dtype = backend, x.hidden.dtype
        ctx.inputs = None
        if unit is not None:
            ctx.save_for_backward(*unit)
        else:
            assert normalisers is not None
            ctx.save_for_backward(x.hidden, x.target, x.ref_hidden, *normalisers, *stats)
            ctx.inputs = x._replace(hidden=None, target=None, ref_hidden=None)  # pyright: ignore[reportArgumentType]
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logp, _, kl, _, reverse_kl = grads
        g = chunked.Coefficients(logp, kl, reverse_kl)
        weight = bias = None
        if ctx.inputs is None:
            hidden = chunked.unit_backward(chunked.UnitGradient(*ctx.saved_tensors), g).to(ctx.dtype)
        else:
            hidden, target, ref_hidden, *saved = ctx.saved_tensors
            x = ctx.inputs._replace(hidden=hidden, target=target, ref_hidden=ref_hidden)
            with torch.autocast(x.hidden.device.type, enabled=False):
                normalisers, stats = chunked.Normalisers(*saved[:4]), TokenStats(*saved[4:])
                hidden, weight, bias = trained.backward(
                    x, stats, normalisers, g, ctx.needs_input_grad[2:5], ctx.backend.d_logits
                )
        return None, None, hidden, weight, bias, *(None,) * (len(Inputs._fields) - 3)


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficient: Any, wanted: list[bool], *args: Any) -> tuple[Tensor, Tensor]:
        x = Inputs(*args)
        loss, logp, gradients = chunked.folded(x, coefficient, wanted)
        ctx.mark_non_differentiable(logp)
        ctx.save_for_backward(*gradients)
        ctx.dtype = x.hidden.dtype
        return loss, logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # rounded to the operand dtype as it is multiplied, without a second fp32 [V, H]
        scaled = (
            None if g is None else torch.mul(g, grad, out=torch.empty_like(g, dtype=ctx.dtype))
            for g in ctx.saved_tensors
        )
        return None, None, *scaled, *(None,) * (len(Inputs._fields) - 3)


def _check(x: Inputs) -> None:
    """Raises ValueError for arguments that do not fit."""
    if x.hidden.ndim != 2 or x.hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be [N, H] of {DTYPES}, got {list(x.hidden.shape)} of {x.hidden.dtype}")
    (rows, size), vocabulary = x.hidden.shape, len(x.weight) if x.weight.ndim else 0
    if x.shard is not None and (vocabulary != x.shard.size or not vocabulary):
        raise ValueError(
            f"weight must be this rank's {x.shard.size} of {x.shard.vocabulary} rows, at least 1, got {vocabulary}"
        )
    shapes = {"weight": (vocabulary, size), "bias": (vocabulary,), "target": (rows,), "ref_hidden": (rows, size)}
    shapes |= {"ref_weight": (vocabulary, size), "kl_rows": (rows,), "reverse_kl_rows": (rows,)}
    dtypes = {"target": torch.int64, "kl_rows": torch.bool, "reverse_kl_rows": torch.bool}
    for name, shape in shapes.items():
        value, dtype = getattr(x, name), dtypes.get(name, x.hidden.dtype)
        if value is None:
            continue
        if hasattr(value, "full_tensor"):
            raise ValueError(f"{name} is a DTensor; pass gathered({name}), or its to_local() and a shard")
        if tuple(value.shape) != shape:
            hint = "; a weight partitioned by ZeRO-3 must be gathered" if name.endswith("weight") else ""
            raise ValueError(f"{name} must be {list(shape)} beside this hidden, got {list(value.shape)}{hint}")
        if value.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} beside a hidden of {x.hidden.dtype}, got {value.dtype}")
        if value.device != x.hidden.device and not (dtype == torch.bool and value.device.type == "cpu"):
            raise ValueError(f"{name} is on {value.device}, hidden on {x.hidden.device}")
    if x.ref_hidden is None and (x.ref_weight is not None or _rows(x)):
        raise ValueError("ref_weight, kl_rows and reverse_kl_rows need ref_hidden")
    if (x.softcap is not None and not x.softcap > 0) or not x.temperature > 0:
        raise ValueError(f"softcap and temperature must be positive, got {x.softcap} and {x.temperature}")
    _check_target(x.target, vocabulary if x.shard is None else x.shard.vocabulary)


def _check_target(target: Tensor, vocabulary: int) -> None:
    inside = ((target >= 0) & (target < vocabulary)).all()
    message = f"target must lie in [0, {vocabulary}); leave rows without supervision out"
    if target.is_cuda:
        torch.ops.aten._assert_async.msg(inside, message)
    elif not inside:
        raise ValueError(f"{message}, got {int(target.min())} to {int(target.max())}")
