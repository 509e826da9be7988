"""Heads split over two ranks, against float64 ordinary code on the whole head."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Split

from fastpo_kernels import token_stats
from fastpo_kernels.testing import gemm_passes, max_error
from fastpo_kernels.token_stats import Shard, chunked, folded_logp, gathered

N, H, V = 14, 11, 37  # 37 rows on two ranks: 19 and 18
RANKS = 2
KL_ROWS, REVERSE_ROWS = torch.arange(N) % 3 == 1, torch.arange(N) % 4 > 1
EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}
OPTIONS = {"plain": {}, "transformed": {"softcap": 3.0, "temperature": 0.7}}
NAMES = ("logp", "ref_logp", "kl", "entropy", "reverse_kl")


def rounded(seed, *shape, dtype=torch.float64, scale=1.0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * made).to(dtype)


TARGET = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
TARGET[:3] = torch.tensor([18, 19, 36])  # both sides of the border, and the end
WEIGHTS = [rounded(10 + i, N) for i in range(3)]  # of logp, kl, reverse_kl in the loss


def problem(dtype, own_head):
    given = {"hidden": rounded(0, N, H), "weight": rounded(1, V, H, scale=0.6), "bias": rounded(2, V)}
    given |= {"ref_hidden": rounded(3, N, H), "ref_weight": rounded(4, V, H, scale=0.6) if own_head else None}
    return {k: None if v is None else v.to(dtype) for k, v in given.items()}


def eager(given, *, softcap=None, temperature=1.0):
    """The five statistics of the whole head, and the gradients of hidden, weight and bias, in float64."""
    x = {k: None if v is None else v.to(torch.float64, copy=True) for k, v in given.items()}
    leaves = [x[k].requires_grad_() for k in ("hidden", "weight", "bias")]

    def log_softmax(hidden, weight):
        logits = hidden @ weight.t() + x["bias"]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return (logits / temperature).log_softmax(-1)

    log_p = log_softmax(x["hidden"], x["weight"])
    log_q = log_softmax(x["ref_hidden"], x["weight"] if x["ref_weight"] is None else x["ref_weight"]).detach()
    logp, ref_logp = (a[torch.arange(N), TARGET] for a in (log_p, log_q))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1) * KL_ROWS
    reverse_kl = (log_p.exp() * (log_p - log_q)).sum(-1) * REVERSE_ROWS
    loss(logp, kl, reverse_kl).backward()
    values = logp, ref_logp, kl, -(log_p.exp() * log_p).sum(-1), reverse_kl
    return [v.detach() for v in values], [leaf.grad for leaf in leaves]


def loss(*stats, at=slice(None)):
    return sum((v * w[at].to(v.dtype)).sum() for v, w in zip(stats, WEIGHTS, strict=True))


def close(got, want, eps, what):
    error = max_error(got, want)
    bound = eps * (1 + want.abs().max().item())
    assert got.shape == want.shape and error <= bound, f"{what}: error {error:.2g} over {bound:.2g}"


def check_vocabulary(rank, mesh):
    """Statistics are whole on both ranks, d hidden is whole, d weight and d bias are local."""
    shard = Shard(mesh.get_group(), V)
    mine = slice(shard.first, shard.first + shard.size)
    for dtype, own_head, train_head, options in (
        (torch.float64, True, True, "transformed"),
        (torch.float64, False, True, "plain"),
        (torch.float64, True, False, "plain"),
        (torch.float32, False, False, "transformed"),
        (torch.float32, False, True, "plain"),
        (torch.bfloat16, False, False, "plain"),
        (torch.bfloat16, True, True, "plain"),
    ):
        what = f"rank {rank} {dtype} own={own_head} trained={train_head}"
        given = problem(dtype, own_head)
        values, gradients = eager(given, **OPTIONS[options])
        x = {
            k: v[mine].clone() if k in ("weight", "bias", "ref_weight") and v is not None else v
            for k, v in given.items()
        }
        leaves = [x[k].requires_grad_(train_head or k == "hidden") for k in ("hidden", "weight", "bias")]
        rows = {"kl_rows": KL_ROWS, "reverse_kl_rows": REVERSE_ROWS}
        stats = token_stats(x.pop("hidden"), x.pop("weight"), TARGET, **x, **rows, **OPTIONS[options], shard=shard)
        loss(stats.logp, stats.kl, stats.reverse_kl).backward()
        for name, got, want in zip(NAMES, stats, values, strict=True):
            close(got.detach(), want, EPS[chunked.accumulator(dtype)], f"{what} {name}")
        close(leaves[0].grad, gradients[0], EPS[dtype], f"{what} d hidden")
        if train_head:
            close(leaves[1].grad, gradients[1][mine], EPS[dtype], f"{what} d weight")
            close(leaves[2].grad, gradients[2][mine], EPS[dtype], f"{what} d bias")


def check_confident_tokens(rank, mesh):
    """1 - p(target) of 1e-3 and less, with the target on either rank."""
    shard = Shard(mesh.get_group(), V)
    weight, mine = rounded(1, V, 24, dtype=torch.float32), slice(shard.first, shard.first + shard.size)
    toward = weight[TARGET] / weight[TARGET].square().sum(-1, keepdim=True)
    hidden = (14 * toward).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    want = (exact @ weight.double().t()).log_softmax(-1)[torch.arange(N), TARGET]
    want.sum().backward()
    assert (want.exp() > 0.999).sum() >= 3
    token_stats(hidden, weight[mine], TARGET, shard=shard).logp.sum().backward()
    error = ((hidden.grad - exact.grad).norm(dim=-1) / exact.grad.norm(dim=-1)).max()
    assert error < 2e-3, f"rank {rank}: d hidden off by {error:.2g} of itself"


def check_dtensor_over_the_vocabulary(rank, mesh):
    """The local part of a DTensor: its gradient is a DTensor of the same placement."""
    given = problem(torch.float64, False)
    values, gradients = eager(given)
    weight = distribute_tensor(given["weight"], mesh, [Split(0)]).requires_grad_()
    bias = distribute_tensor(given["bias"], mesh, [Split(0)])
    stats = token_stats(
        given["hidden"],
        weight.to_local(),
        TARGET,
        bias=bias.to_local(),
        ref_hidden=given["ref_hidden"],
        kl_rows=KL_ROWS,
        reverse_kl_rows=REVERSE_ROWS,
        shard=Shard(mesh.get_group(), len(weight)),
    )
    loss(stats.logp, stats.kl, stats.reverse_kl).backward()
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == weight.placements
    close(weight.grad.full_tensor(), gradients[1], 1e-12, f"rank {rank} d weight")


def check_folded(rank, mesh):
    """Three passes of this rank's share, and the whole head's gradients."""
    shard = Shard(mesh.get_group(), V)
    mine = slice(shard.first, shard.first + shard.size)
    leaves = [rounded(0, N, H).requires_grad_(), rounded(1, V, H, scale=0.6)[mine].clone().requires_grad_()]
    whole = [rounded(0, N, H).requires_grad_(), rounded(1, V, H, scale=0.6).requires_grad_()]
    m = WEIGHTS[0]
    total = [torch.empty(0)]

    def run():
        total[0] = folded_logp(*leaves, TARGET, lambda logp, rows: (m[rows] * logp, m[rows]), shard=shard)[0]
        total[0].backward()

    assert gemm_passes(run, N, H, shard.size) == 3
    want = (m * (whole[0] @ whole[1].t()).log_softmax(-1)[torch.arange(N), TARGET]).sum()
    want.backward()
    close(total[0].detach(), want.detach(), 1e-12, "loss")
    close(leaves[0].grad, whole[0].grad, 1e-12, f"rank {rank} d hidden")
    close(leaves[1].grad, whole[1].grad[mine], 1e-12, f"rank {rank} d weight")


def check_gathered(rank, mesh):
    """FSDP2: each rank has half of the rows and a shard of the head, whose gradient is the sum over both halves."""
    for dtype, train_head in ((torch.float64, True), (torch.float64, False), (torch.float32, True)):
        given, at = problem(dtype, True), slice(rank, None, RANKS)
        values, gradients = eager(given)
        heads = {k: distribute_tensor(given[k], mesh, [Split(0)]) for k in ("weight", "bias", "ref_weight")}
        for name in ("weight", "bias"):
            heads[name].requires_grad_(train_head)
        hidden = given["hidden"][at].clone().requires_grad_()
        whole = {k: gathered(v) for k, v in heads.items()}
        stats = token_stats(
            hidden,
            whole.pop("weight"),
            TARGET[at],
            ref_hidden=given["ref_hidden"][at],
            **whole,
            kl_rows=KL_ROWS[at],
            reverse_kl_rows=REVERSE_ROWS[at],
        )
        loss(stats.logp, stats.kl, stats.reverse_kl, at=at).backward()
        for name, got, want in zip(NAMES, stats, values, strict=True):
            close(got.detach(), want[at], EPS[dtype], f"rank {rank} {dtype} {name}")
        close(hidden.grad, gradients[0][at], EPS[dtype], f"rank {rank} {dtype} d hidden")
        assert heads["ref_weight"].grad is None and (heads["weight"].grad is not None) == train_head
        for name, want in zip(("weight", "bias"), gradients[1:], strict=True):
            if train_head:
                grad = heads[name].grad
                assert isinstance(grad, DTensor) and grad.placements == heads[name].placements
                close(grad.full_tensor(), want, EPS[dtype], f"rank {rank} {dtype} d {name}")
    plain = torch.zeros(2, 3)
    assert gathered(plain) is plain
    with pytest.raises(ValueError, match=r"weight is a DTensor; pass gathered\(weight\), or its to_local\(\)"):
        token_stats(torch.zeros(N, H, dtype=dtype), heads["weight"], TARGET)


def check_refusals(rank, mesh):
    shard, hidden = Shard(mesh.get_group(), V), torch.zeros(N, H)
    weight = torch.zeros(shard.size, H)
    with pytest.raises(ValueError, match=rf"weight must be this rank's {shard.size} of 37 rows, at least 1, got 7"):
        token_stats(hidden, weight[:7], TARGET, shard=shard)
    with pytest.raises(ValueError, match=r"target must lie in \[0, 37\).*0 to 37"):
        token_stats(hidden, weight, torch.tensor([0, 37] * 7), shard=shard)
    for backend in ("reference", "triton"):
        with pytest.raises(ValueError, match=f"backend '{backend}' has no shard; use 'chunked'"):
            token_stats(hidden, weight, TARGET, shard=shard, backend=backend)
    assert token_stats(hidden[:0], weight, TARGET[:0], shard=shard).logp.shape == (0,)


CHECKS = [v for k, v in list(globals().items()) if k.startswith("check_")]


def on_rank(rank, store):
    torch.set_num_threads(1)
    chunked.TILE_BYTES = 5 * 19 * 8  # 5 rows of 14 in float64, 10 in fp32, on both ranks
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for check in CHECKS:
        check(rank, mesh)
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    mp.spawn(on_rank, (str(tmp_path / "store"),), nprocs=RANKS)
