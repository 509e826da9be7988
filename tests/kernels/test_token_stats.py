import itertools

import pytest
import torch
from torch import nn

from fastpo_kernels import token_stats
from fastpo_kernels.testing import assert_no_worse, gemm_passes, max_error, nan_scratch
from fastpo_kernels.token_stats import chunked

N, H, V = 13, 11, 37
EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
KL_ROWS = {"none": None, "some": torch.arange(N) % 3 == 1, "all": True}
TRANSFORMS = {"plain": {}, "transformed": {"softcap": 3.0, "temperature": 0.7}}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "TILE_BYTES", 5 * V * 4)  # 5 rows, of which 13 make no whole number


def rounded(seed, *shape, dtype, scale=1.0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * made).to(dtype)


def problem(dtype, *, own_head=False, biased=False):
    """A case of odd sizes, logits of a few units."""
    return {
        "hidden": rounded(0, N, H, dtype=dtype),
        "weight": rounded(1, V, H, dtype=dtype, scale=0.6),
        "bias": rounded(2, V, dtype=dtype) if biased else None,
        "ref_hidden": rounded(3, N, H, dtype=dtype),
        "ref_weight": rounded(4, V, H, dtype=dtype, scale=0.6) if own_head else None,
    }


TARGET = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))


def eager(given, target, kl_rows, *, softcap=None, temperature=1.0):
    """The formulas in ordinary code: logits in the dtype of the inputs, then fp32 (float64) as trainers do it."""

    def log_softmax(hidden, weight):
        logits = nn.functional.linear(hidden, weight, given["bias"])
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return (logits / temperature).log_softmax(-1)

    rows = torch.arange(len(target))
    log_p = log_softmax(given["hidden"], given["weight"])
    ref_weight = given["weight"] if given["ref_weight"] is None else given["ref_weight"]
    log_q = log_softmax(given["ref_hidden"], ref_weight).detach()
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    if isinstance(kl_rows, torch.Tensor):
        kl = kl * kl_rows
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    return {
        "logp": log_p[rows, target],
        "ref_logp": log_q[rows, target],
        "kl": None if kl_rows is None else kl,
        "entropy": entropy,
    }


def ours(given, target, kl_rows, *, backend, **options):
    args = {k: v for k, v in given.items() if k not in ("hidden", "weight")}
    with nan_scratch():
        head = given["hidden"], given["weight"]
        return token_stats(*head, target, kl_rows=kl_rows, backend=backend, **args, **options)._asdict()


def with_gradients(compute, given, trained, dtype=None):
    """Values, then the gradients of the trained inputs under fixed random coefficients of logp and kl."""
    given = {k: v if v is None or dtype is None else v.to(dtype) for k, v in given.items()}
    leaves = {k: v.detach().requires_grad_() for k, v in given.items() if k in trained and v is not None}
    stats = compute(given | leaves)
    rows = len(given["hidden"])
    loss = (stats["logp"] * rounded(6, rows, dtype=stats["logp"].dtype)).sum()
    if stats["kl"] is not None:
        loss = loss + (stats["kl"] * rounded(7, rows, dtype=stats["kl"].dtype)).sum()
    with nan_scratch():
        loss.backward()
    values = {k: v.detach() for k, v in stats.items() if v is not None}
    return values, {f"d {k}": leaf.grad for k, leaf in leaves.items()}


MATRIX = list(itertools.product(EPS, ["frozen", "trained"], KL_ROWS, TRANSFORMS, ["shared", "own"]))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype, head, kl_rows, transform, ref_head", MATRIX)
def test_values_and_gradients_equal_the_definition(backend, dtype, head, kl_rows, transform, ref_head):
    given = problem(dtype, own_head=ref_head == "own", biased=transform == "transformed")
    trained = ("hidden",) if head == "frozen" else ("hidden", "weight", "bias")
    rows, options = KL_ROWS[kl_rows], TRANSFORMS[transform]
    got = with_gradients(lambda x: ours(x, TARGET, rows, backend=backend, **options), given, trained)
    plain = with_gradients(lambda x: eager(x, TARGET, rows, **options), given, trained)
    exact = with_gradients(lambda x: eager(x, TARGET, rows, **options), given, trained, torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got[0].keys() == exact[0].keys()
    for name, value in exact[0].items():
        assert got[0][name].dtype == wide
        assert_no_worse(got[0][name], plain[0][name], value, eps=EPS[wide], what=name)
    for name, value in exact[1].items():
        assert got[1][name].dtype == dtype
        assert_no_worse(got[1][name], plain[1][name], value, eps=EPS[dtype], what=name)


@pytest.mark.parametrize("trained", [{"weight"}, {"bias"}, {"hidden", "bias"}])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_any_subset_of_the_inputs_can_be_trained(backend, trained):
    given = problem(torch.float64, biased=True)
    rows = KL_ROWS["some"]
    got = with_gradients(lambda x: ours(x, TARGET, rows, backend=backend), given, trained)[1]
    exact = with_gradients(lambda x: eager(x, TARGET, rows), given, trained)[1]
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert max_error(got[name], value) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradcheck(backend, train_head, options):
    given = problem(torch.float64, own_head=True, biased=True)  # what both models share would move the reference too
    small = {"hidden": (5, 4), "ref_hidden": (5, 4), "weight": (7, 4), "ref_weight": (7, 4), "bias": (7,)}
    x = {k: given[k][tuple(map(slice, shape))].clone() for k, shape in small.items()}
    leaves = x["hidden"].requires_grad_(), x["weight"].requires_grad_(train_head)
    ref = {"ref_hidden": x["ref_hidden"], "ref_weight": x["ref_weight"], "kl_rows": KL_ROWS["some"][:5]}

    def outputs(hidden, weight):
        stats = token_stats(hidden, weight, TARGET[:5] % 7, bias=x["bias"], backend=backend, **ref, **options)
        return stats.logp, stats.kl

    assert torch.autograd.gradcheck(outputs, leaves)


def passes(given, *, kl_rows=None, reference=True, trained=("hidden",), coefficients=None):
    n = len(given["hidden"])

    def run():
        tensors = {k: v if v is None else v.clone().requires_grad_(k in trained) for k, v in given.items()}
        ref = {"ref_hidden": tensors["ref_hidden"], "ref_weight": tensors["ref_weight"]} if reference else {}
        stats = token_stats(tensors["hidden"], tensors["weight"], TARGET[:n], kl_rows=kl_rows, **ref)
        loss = (stats.logp * (1.0 if coefficients is None else coefficients)).sum()
        loss = loss if stats.kl is None else loss + stats.kl.sum()
        if loss.requires_grad:
            loss.backward()

    return gemm_passes(run, n, H, V)


def test_gemm_passes():
    given = problem(torch.float32)
    given |= {k: given[k][:12] for k in ("hidden", "ref_hidden")}
    own = problem(torch.float32, own_head=True) | {k: given[k] for k in ("hidden", "ref_hidden")}
    half = torch.arange(12) % 2 == 0
    both = ("hidden", "weight")
    assert passes(given, trained=(), reference=False) == 1
    assert passes(given, trained=()) == 2
    with torch.no_grad():
        assert passes(given) == 2
    assert passes(given, reference=False) == 2
    for case in (given, own):
        assert passes(case) == 3
        assert passes(case, kl_rows=half) == 3.5
        assert passes(case, kl_rows=True) == 4
    assert passes(given, reference=False, trained=both) == 4
    assert passes(given, reference=False, trained=("weight",)) == 3
    assert passes(given, kl_rows=half, trained=both) == 5.5
    # a row whose coefficient is 0 leaves all three products of the backward
    assert passes(given, reference=False, trained=both, coefficients=half.float()) == 1 + 3 / 2


def confident(dtype):
    """Rows whose p(target) climbs from almost 0 to 0.9999: h points at the row of its target, ever further."""
    weight = rounded(1, 257, 32, dtype=dtype, scale=0.02)  # as language models are initialised
    target = torch.arange(200) % 257
    toward = weight[target].double()
    length = torch.linspace(0.5, 16, 200)[:, None]
    noise = 0.3 * rounded(2, 200, 32, dtype=torch.float64)
    hidden = (length * toward / toward.square().sum(-1, keepdim=True) + noise).to(dtype)
    return {"hidden": hidden, "weight": weight, "bias": None, "ref_hidden": hidden, "ref_weight": None}, target


def d_hidden(compute, given, dtype=None):
    hidden = given["hidden"].to(dtype or given["hidden"].dtype).detach().requires_grad_()
    rest = {k: v if v is None else v.to(hidden.dtype) for k, v in given.items()}
    stats = compute(rest | {"hidden": hidden})
    stats["total"].backward()
    return stats, hidden.grad.double()


def relative(got, exact):
    return ((got - exact).norm(dim=-1) / exact.norm(dim=-1)).mean().item()


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("dtype, loss_scale, bound", [(torch.bfloat16, 1.0, 4e-3), (torch.float16, 1024.0, 5e-4)])
def test_d_hidden_is_as_good_for_confident_tokens(dtype, loss_scale, bound, train_head, monkeypatch):
    monkeypatch.setattr(chunked, "TILE_BYTES", 64 * 257 * 4)
    given, target = confident(dtype)
    given["weight"].requires_grad_(train_head)

    def total(stats):
        return stats | {"total": loss_scale * stats["logp"].sum()}

    _, got = d_hidden(lambda x: total(token_stats(x["hidden"], x["weight"], target)._asdict()), given)
    _, plain = d_hidden(lambda x: total(eager(x, target, None)), given)
    stats, exact = d_hidden(lambda x: total(eager(x, target, None)), given, torch.float64)
    p, edges = stats["logp"].exp(), [0, 0.5, 0.9, 0.99, 0.999, 1]
    for low, high in itertools.pairwise(edges):
        rows = (p >= low) & (p < high)
        assert rows.sum() >= 3, f"no tokens with p(y) in [{low}, {high})"
        mine, theirs = relative(got[rows], exact[rows]), relative(plain[rows], exact[rows])
        assert mine <= theirs and mine < bound, f"p(y) in [{low}, {high}): {mine:.2g}, plain code {theirs:.2g}"


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("own_head, train_head", itertools.product([False, True], repeat=2))
def test_kl_near_the_reference(distance, own_head, train_head, monkeypatch):
    monkeypatch.setattr(chunked, "TILE_BYTES", 64 * 257 * 4)
    given, target = confident(torch.bfloat16)
    shift = 0.9 * (distance / 1e-3) ** 0.5
    given["ref_hidden"] = (given["hidden"].double() + shift * rounded(8, 200, 32, dtype=torch.float64)).bfloat16()
    given["ref_weight"] = given["weight"].clone() if own_head else None
    given["weight"].requires_grad_(train_head)

    def total(stats):
        return stats | {"total": stats["kl"].sum()}

    got = d_hidden(lambda x: total(ours(x, target, True, backend="chunked")), given)
    plain = d_hidden(lambda x: total(eager(x, target, True)), given)
    exact = d_hidden(lambda x: total(eager(x, target, True)), given, torch.float64)
    near = (exact[0]["kl"] > distance / 3) & (exact[0]["kl"] < distance * 3)
    assert near.sum() >= 20
    for what, three, bound in (
        ("kl", [s[0]["kl"].detach().double()[near, None] for s in (got, plain, exact)], 1e-3),
        ("d hidden", [s[1][near] for s in (got, plain, exact)], 4e-3),
    ):
        mine, theirs = relative(three[0], three[2]), relative(three[1], three[2])
        assert mine <= theirs and mine < bound, f"{what}: {mine:.2g}, plain code {theirs:.2g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kl_of_equal_models_is_zero_and_never_negative(dtype):
    given = problem(dtype)
    same = token_stats(given["hidden"], given["weight"], TARGET, ref_hidden=given["hidden"], kl_rows=True)
    assert same.kl.abs().max() < 1e-9 and max_error(same.logp, same.ref_logp) < 1e-6
    close = given["hidden"] * (1 + 2**-7)
    assert (token_stats(given["hidden"], given["weight"], TARGET, ref_hidden=close, kl_rows=True).kl > 0).all()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("train_head", [False, True])
def test_no_rows(backend, train_head):
    given = problem(torch.float32)
    hidden, weight = given["hidden"][:0].requires_grad_(), given["weight"].requires_grad_(train_head)
    stats = token_stats(hidden, weight, TARGET[:0], ref_hidden=given["ref_hidden"][:0], kl_rows=True, backend=backend)
    assert [field.shape for field in stats[:4]] == [(0,)] * 4
    with nan_scratch():
        (stats.logp.sum() + stats.kl.sum()).backward()
    assert hidden.grad.shape == (0, H)
    if train_head:
        assert weight.grad.equal(torch.zeros_like(weight))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("train_head", [False, True])
def test_inputs_need_not_be_contiguous(backend, train_head):
    trained = ("hidden", "weight") if train_head else ("hidden",)
    given = problem(torch.float64, own_head=True, biased=True)
    strided = {k: v.repeat_interleave(2, 0)[::2] for k, v in given.items()}
    strided |= {k: strided[k].t().contiguous().t() for k in ("weight", "ref_hidden")}
    rows, target = KL_ROWS["some"], TARGET.repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in (*strided.values(), target))

    def compute(x):  # views of the leaves, so that the op itself sees the strides
        return ours({k: v.expand_as(v) for k, v in x.items()}, target, rows, backend=backend)

    got = with_gradients(compute, strided, trained)
    want = with_gradients(lambda x: eager(x, TARGET, rows), given, trained)
    for g, w in zip(got, want, strict=True):
        assert g.keys() == w.keys() and all(max_error(g[k], w[k]) < 1e-12 for k in w)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("train_head", [False, True])
def test_no_gradient_reaches_the_reference(backend, train_head):
    given = problem(torch.float32, own_head=True)
    leaves = {k: v.requires_grad_(k != "weight" or train_head) for k, v in given.items() if v is not None}
    stats = token_stats(
        leaves["hidden"],
        leaves["weight"],
        TARGET,
        ref_hidden=leaves["ref_hidden"],
        ref_weight=leaves["ref_weight"],
        kl_rows=True,
        backend=backend,
    )
    assert (stats.logp.requires_grad, stats.kl.requires_grad) == (True, True)
    assert (stats.ref_logp.requires_grad, stats.entropy.requires_grad) == (False, False)
    (stats.logp.sum() + stats.kl.sum()).backward()
    assert leaves["ref_hidden"].grad is None and leaves["ref_weight"].grad is None


@pytest.mark.parametrize("train_head", [False, True])
def test_two_graphs_and_two_backwards(train_head):
    given = problem(torch.float32)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_(train_head)

    def loss(rows):
        stats = token_stats(hidden, weight, TARGET, ref_hidden=given["ref_hidden"], kl_rows=rows)
        return stats.logp.sum() + stats.kl.sum()

    def gradient(of):
        return torch.autograd.grad(of, hidden, retain_graph=True)[0]

    first, second = loss(KL_ROWS["some"]), loss(True)
    apart = gradient(first), gradient(second)
    assert gradient(second).equal(apart[1]) and gradient(first).equal(apart[0])
    assert gradient(first + second).equal(apart[0] + apart[1])


@pytest.mark.parametrize("train_head", [False, True])
def test_head_may_be_empty_between_forward_and_backward(train_head):
    """What ZeRO-3 does to a parameter; a frozen head may stay away."""
    given = problem(torch.float32, own_head=True)
    heads = [nn.Parameter(given[k], requires_grad=train_head and k == "weight") for k in ("weight", "ref_weight")]
    ref = {"ref_hidden": given["ref_hidden"], "ref_weight": heads[1], "kl_rows": True}
    whole = [head.data.clone() for head in heads]
    hidden = given["hidden"].requires_grad_()
    stats = token_stats(hidden, heads[0], TARGET, **ref)
    want = torch.autograd.grad(stats.logp.sum() + stats.kl.sum(), hidden)[0]
    stats = token_stats(hidden, heads[0], TARGET, **ref)
    for head, data in zip(heads, whole, strict=True):
        head.data.fill_(torch.nan)  # the memory goes to another parameter
        head.data = data if train_head else torch.empty(0)
    (stats.logp.sum() + stats.kl.sum()).backward()
    assert hidden.grad.equal(want)
    assert (heads[0].grad is not None) == train_head


def test_unused_outputs_and_autocast():
    given = problem(torch.float32)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    ref = {"ref_hidden": given["ref_hidden"], "kl_rows": True}
    want = token_stats(hidden, weight, TARGET, **ref)
    d_logp, d_kl = (torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (want.logp, want.kl))
    together = torch.autograd.grad(want.logp.sum() + want.kl.sum(), (hidden, weight))
    for got, a, b in zip(together, d_logp, d_kl, strict=True):
        torch.testing.assert_close(got, a + b)
    for backend in ("chunked", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            stats = token_stats(hidden, weight, TARGET, **ref, backend=backend)
        stats.logp.sum().backward()
        torch.testing.assert_close(stats.logp, want.logp)
        torch.testing.assert_close(hidden.grad, d_logp[0])
        hidden.grad = None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": torch.zeros(N)}, r"hidden must be \[N, H\]"),
        ({"hidden": torch.zeros(N, H, dtype=torch.int64)}, r"hidden must be \[N, H\]"),
        ({"weight": torch.zeros(V, H + 1)}, "weight must be .* must be gathered"),
        ({"weight": torch.zeros(0)}, "weight must be .* must be gathered"),
        ({"weight": torch.zeros(V, H, dtype=torch.float64)}, "weight must be torch.float32"),
        ({"weight": torch.zeros(V, H, device="meta")}, "weight is on meta, hidden on cpu"),
        ({"target": TARGET[:-1]}, "target must be"),
        ({"target": TARGET.int()}, "target must be torch.int64"),
        ({"target": TARGET - 38}, r"target must lie in \[0, 37\)"),
        ({"target": torch.full((N,), V)}, r"target must lie in \[0, 37\).*37 to 37"),
        ({"ref_hidden": torch.zeros(N + 1, H)}, "ref_hidden must be"),
        ({"ref_weight": torch.zeros(V, H)}, "need ref_hidden"),
        ({"kl_rows": True}, "need ref_hidden"),
        ({"kl_rows": torch.ones(N)}, "kl_rows must be torch.bool"),
        ({"bias": torch.zeros(1)}, "bias must be"),
        ({"softcap": 0.0}, "must be positive"),
        ({"temperature": 0.0}, "must be positive"),
        ({"backend": "fancy"}, "'fancy' is unknown; this version has .*reference, chunked, of which usable"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    given = {"hidden": torch.zeros(N, H), "weight": torch.zeros(V, H), "target": TARGET} | changes
    with pytest.raises(ValueError, match=message):
        token_stats(**given)


def test_no_kl_unless_asked():
    given = problem(torch.float32)
    stats = token_stats(given["hidden"], given["weight"], TARGET, ref_hidden=given["ref_hidden"], kl_rows=False)
    assert stats.kl is None and stats.ref_logp is not None
    alone = token_stats(given["hidden"], given["weight"], TARGET)
    assert alone.ref_logp is None and alone.kl is None and alone.entropy is not None
