"""The fused functions against golden cases, and against padded eager code in the same dtype and in float64."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastpo_kernels import fused_dpo, fused_grpo, fused_logp, fused_perpo, fused_rrpo
from fastpo_kernels.testing import assert_no_worse, gemm_passes, max_error, nan_scratch
from fastpo_kernels.token_stats import chunked

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("dpo", "rrpo", "perpo", "grpo")
INDEX = {family: json.loads((GOLDEN / family / "index.json").read_text()) for family in FAMILIES}
TENSORS = {family: load_file(GOLDEN / family / f"{family}.safetensors") for family in FAMILIES}
CASES = {(family, case["id"]): case for family in FAMILIES for case in INDEX[family]["cases"]}
HELD_QUIRKS = {("dpo", "perpo_norm_n4"), ("dpo", "perpo_old_n4"), ("rrpo", "prompt_specials_labelled")}
HELD_QUIRKS |= {("rrpo", "videochat2_difflib")}
EXACT = [
    k for k, case in CASES.items() if (not case.get("quirk") or k in HELD_QUIRKS) and case.get("dtype") != "bfloat16"
]
EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "TILE_BYTES", 5 * 37 * 4)


def golden(key):
    family, case = key
    return {k.removeprefix(f"{case}/"): v for k, v in TENSORS[family].items() if k.startswith(f"{case}/")}


def fused(key, dtype, backend, train_head):
    """Loss, metrics, d hidden and d weight of a golden case, rows as their code has them."""
    family, case, t = key[0], CASES[key], golden(key)
    rename = {"weight": "lm_head", "ref_weight": "ref_lm_head"} if family == "grpo" else {}
    hidden, weight, ref_hidden, ref_weight = (
        t[rename.get(name, name)].to(dtype, copy=True) for name in ("hidden", "weight", "ref_hidden", "ref_weight")
    )
    hidden.requires_grad_()
    weight.requires_grad_(train_head)
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    variant = case.get("variant", family)
    if family == "grpo":
        labels = t["prompt_completion_ids"].clone()
        labels[:, : -t["completion_mask"].shape[1]] = -100
        labels[:, -t["completion_mask"].shape[1] :][t["completion_mask"] == 0] = -100
        ref_logp = fused_logp(ref_hidden, ref_weight, labels, backend=backend)
        options = {"beta": case["beta"], "ref_logp": ref_logp, "backend": backend}
        loss, metrics = fused_grpo(hidden, weight, labels, t["advantages"], **options)
    elif family == "rrpo" or variant == "rrpo_degenerate":
        labels = t["targets"] if "targets" in t else t["labels"]
        options = {"beta": case["hyper"]["beta"], "alpha": case["hyper"].get("alpha", 0.0), "backend": backend}
        phrases = t["signs"] if "signs" in t else labels != -100
        loss, metrics = fused_rrpo(hidden, weight, labels, phrase_mask=phrases, **ref, **options)
    elif variant == "dpo":
        options = {"beta": case["hyper"]["beta"], "backend": backend}
        loss, metrics = fused_dpo(hidden, weight, t["labels"], **ref, **options)
    else:
        loss, metrics = fused_list(case, t, hidden, weight, ref, backend)
    loss.backward()
    return loss.detach(), metrics, hidden.grad, weight.grad


def fused_list(case, t, hidden, weight, ref, backend):
    """Their rows are candidate-major, ours prompt-major; list DPO is the first candidate against the last."""
    rows = torch.arange(len(hidden)).reshape(-1, case["B"])
    beta = case["hyper"]["beta"]
    if case.get("variant") == "dpo_list":
        rows = rows[[0, -1]].flatten()
        ref = ref | {"ref_hidden": ref["ref_hidden"][rows]}
        return fused_dpo(hidden[rows], weight, t["labels"][rows], beta=beta, backend=backend, **ref)
    rows = rows.T.flatten()
    ref = ref | {"ref_hidden": ref["ref_hidden"][rows]}
    options = {"gamma": case["hyper"]["gamma"] or 0.0, "length_normalized": case.get("variant") == "perpo_norm"}
    scores = t["rewards"] if "rewards" in t else -torch.arange(case["N"]).expand(case["B"], -1)
    return fused_perpo(
        hidden[rows], weight, t["labels"][rows], scores=scores, beta=beta, backend=backend, **options, **ref
    )


def assert_golden(key, got, tolerance):
    t = golden(key)
    loss, metrics, d_hidden, d_weight = got
    want = t["expected_loss"][0] if key[0] == "grpo" else t["loss"]
    d_head = t["grad_lm_head" if key[0] == "grpo" else "grad_weight"]
    for what, value, exact in (
        ("loss", loss, want),
        ("d hidden", d_hidden, t["grad_hidden"]),
        ("d head", d_weight, d_head),
    ):
        if value is not None:
            assert max_error(value, exact) <= tolerance * max(1.0, exact.abs().max().item()), what
    if key[0] == "rrpo":
        kl = t["kl"][: CASES[key]["B"]].mean()
        assert max_error(metrics["kl"], kl) <= tolerance * max(1.0, kl.abs().item())


@pytest.mark.parametrize("key", EXACT, ids="/".join)
def test_golden_float64(key):
    tolerance = {"float64": 1e-9} if key[0] == "grpo" else dict(INDEX[key[0]]["tolerance"])
    if CASES[key].get("quirk") and key[0] == "dpo":
        tolerance = INDEX["perpo"]["tolerance"]  # weights rounded to fp32
    tolerance = tolerance[CASES[key].get("dtype", "float64")]
    assert_golden(key, fused(key, torch.float64, "reference", True), tolerance)
    assert_golden(key, fused(key, torch.float64, "chunked", False), tolerance)


@pytest.mark.parametrize("key", EXACT, ids="/".join)
def test_golden_fp32(key):
    for backend, train_head in (("reference", True), ("chunked", True), ("chunked", False)):
        assert_golden(key, fused(key, torch.float32, backend, train_head), 1e-5)


# Four responses: left padding, right padding, one without a token, one with a supervised first position.
ROWS, T, H, V = 4, 9, 11, 37
SUPERVISED = [(3, 9), (0, 4), (5, 5), (4, 7)]


def rounded(seed, *shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def make_labels():
    labels = torch.randint(0, V, (ROWS, T), generator=torch.Generator().manual_seed(5))
    for row, (first, stop) in enumerate(SUPERVISED):
        labels[row, :first] = labels[row, stop:] = -100
    return labels


LABELS = make_labels()
MASK = LABELS[:, 1:] != -100
PHRASES = (torch.arange(T) % 2 == 1).expand(ROWS, T)
SCORES = torch.tensor([[0.25, 0.5], [1.0, 0.0]])
ADVANTAGES = torch.tensor([1.5, -0.5, 2.0, -1.0])
OLD_LOGP = rounded(8, ROWS, T - 1, scale=0.3)


def problem(dtype):
    return {
        "hidden": rounded(0, ROWS, T, H, dtype=dtype),
        "weight": rounded(1, V, H, dtype=dtype, scale=0.6),
        "ref_hidden": rounded(3, ROWS, T, H, dtype=dtype),
        "ref_weight": rounded(4, V, H, dtype=dtype, scale=0.6),
        "bias": rounded(2, V, dtype=dtype),
    }


def log_probs(hidden, weight, x, options):
    """[rows, T - 1, V] as trainers do it: logits in the dtype of the model, then fp32."""
    logits = F.linear(hidden, weight, x.get("bias"))[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    return (logits / options.get("temperature", 1.0)).log_softmax(-1)


def eager(name, x, **options):
    """The four losses as padded code writes them, from whole logits."""
    log_p, log_q = (
        log_probs(x["hidden"], x["weight"], x, options),
        log_probs(x["ref_hidden"], x["ref_weight"], x, options),
    )
    log_q, index = log_q.detach(), LABELS[:, 1:].clamp(min=0)[..., None]
    logp, ref_logp = (z.gather(-1, index)[..., 0] * MASK for z in (log_p, log_q))
    s = (logp - ref_logp).sum(1)
    if name == "dpo":
        return -F.logsigmoid(0.3 * (s[:2] - s[2:])).mean()
    if name == "rrpo":
        phrases = ((logp - ref_logp) * PHRASES[:, 1:]).sum(1)
        kl = ((log_q.exp() * (log_q - log_p)).sum(-1) * MASK)[:2].sum(1)
        return (-F.logsigmoid(0.3 * (phrases[:2] - phrases[2:])) + 0.2 * kl).mean()
    if name == "perpo":
        return -F.logsigmoid(0.3 * torch.stack([s[1] - s[0], s[2] - s[3]])).mean()
    old = logp.detach() + OLD_LOGP.to(logp)
    advantage, tokens = ADVANTAGES[:, None].to(logp), MASK.sum(1).clamp(min=1)
    ratio = (logp - old).exp()
    if name == "gspo":
        ratio = (((logp - old) * MASK).sum(1) / tokens).exp()[:, None].expand_as(logp)
    policy = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    token = (policy + 0.2 * ((ref_logp - logp).exp() - (ref_logp - logp) - 1)) * MASK
    if name == "dapo":
        return token.sum() / MASK.sum()
    return (token.sum(1) / (7 if name == "dr_grpo" else tokens)).mean()


def ours(name, x, labels=LABELS, **options):
    """(loss, metrics) of the same numbers by the fused function; the old policy is the policy, moved by OLD_LOGP."""
    args, ref = (x["hidden"], x["weight"], labels), {"ref_hidden": x["ref_hidden"], "ref_weight": x["ref_weight"]}
    head = {"bias": x.get("bias"), **options}
    if name == "dpo":
        return fused_dpo(*args, **ref, beta=0.3, **head)
    if name == "rrpo":
        return fused_rrpo(*args, **ref, phrase_mask=PHRASES, beta=0.3, alpha=0.2, **head)
    if name == "perpo":
        return fused_perpo(*args, **ref, scores=SCORES, beta=0.3, **head)
    with torch.no_grad():
        ref_logp = fused_logp(x["ref_hidden"], x["ref_weight"], labels, **head)
        old_logp = fused_logp(*args, **head)
        old_logp = old_logp + OLD_LOGP.to(old_logp)
    options = {"old_logp": old_logp, "ref_logp": ref_logp, "beta": 0.2, "loss_type": name}
    return fused_grpo(*args, ADVANTAGES, max_completion_length=7, **options, **head)


NAMES = ("dpo", "rrpo", "perpo", "grpo", "gspo", "dr_grpo", "dapo")


def with_gradients(compute, given, trained, dtype=None):
    given = {k: v.to(dtype or v.dtype, copy=True) for k, v in given.items()}
    for name in trained:
        given[name].requires_grad_()
    with nan_scratch():
        loss = compute(given)
        loss.backward()
    return {"loss": loss.detach()} | {f"d {name}": given[name].grad for name in trained}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
def test_no_worse_than_padded_eager_code(name, dtype, trained):
    given = problem(dtype)
    plain = with_gradients(lambda x: eager(name, x), given, trained)
    exact = with_gradients(lambda x: eager(name, x), given, trained, torch.float64)
    for backend in ("chunked", "reference"):
        got = with_gradients(lambda x, b=backend: ours(name, x, backend=b)[0], given, trained)
        for what, value in exact.items():
            out_dtype = got[what].dtype
            assert out_dtype == (dtype if what != "loss" else torch.promote_types(dtype, torch.float32))
            assert_no_worse(got[what], plain[what], value, eps=EPS[out_dtype], what=f"{backend}: {what}")


@pytest.mark.parametrize("name", NAMES)
def test_head_options_reach_the_head(name):
    given, options = problem(torch.float64), {"softcap": 3.0, "temperature": 0.7}
    got = with_gradients(lambda x: ours(name, x, **options)[0], given, ("hidden", "weight", "bias"))
    want = with_gradients(lambda x: eager(name, x, **options), given, ("hidden", "weight", "bias"))
    assert all(max_error(got[k], want[k]) < 1e-12 for k in want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_head", [False, True])
def test_gradcheck(name, train_head):
    x = {k: v[..., :4].clone() if k != "bias" else v for k, v in problem(torch.float64).items()}
    fixed = {} if name in ("dpo", "rrpo", "perpo") else {"old": fused_logp(x["hidden"], x["weight"], LABELS)}

    def compute(hidden, weight):
        given = x | {"hidden": hidden, "weight": weight}
        if not fixed:
            return ours(name, given)[0]
        options = {"old_logp": fixed["old"] + OLD_LOGP, "loss_type": name, "max_completion_length": 7}
        return fused_grpo(hidden, weight, LABELS, ADVANTAGES, **options)[0]

    leaves = x["hidden"].requires_grad_(), x["weight"].requires_grad_(train_head)
    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)


def passes(name, train_head=False):
    """GEMM passes over the supervised rows, policy and reference under one head."""
    x = problem(torch.float32)
    del x["bias"]
    x["hidden"].requires_grad_()
    x["weight"].requires_grad_(train_head)
    x["ref_weight"] = None
    labels = torch.randint(0, V, (ROWS, T))
    rows = ROWS * (T - 1)
    if name == "grpo":
        ref_logp = torch.zeros(ROWS, T - 1)
        return gemm_passes(
            lambda: fused_grpo(x["hidden"], x["weight"], labels, ADVANTAGES, ref_logp=ref_logp)[0].backward(),
            rows,
            H,
            V,
        )
    return gemm_passes(lambda: ours(name, x, labels)[0].backward(), rows, H, V)


def test_gemm_passes():
    frozen = {"dpo": 3.0, "rrpo": 3.5, "perpo": 3.0, "grpo": 2.0}
    assert {name: passes(name) for name in frozen} == frozen
    # RRPO: both logits; the backward's three for 3/4 of the rows, since the others, on the worse side and outside of
    # phrases, have coefficient 0; and the reference's logits again where there is KL
    trained = {"dpo": 5.0, "rrpo": 2 + 3 * 0.75 + 0.5, "perpo": 5.0, "grpo": 4.0}
    assert {name: passes(name, train_head=True) for name in trained} == trained


def test_only_supervised_rows_enter_the_head():
    x = problem(torch.float32)
    share = MASK.sum().item() / (ROWS * T)
    got = gemm_passes(lambda: fused_logp(x["hidden"], x["weight"], LABELS), ROWS * T, H, V)
    assert got == pytest.approx(share)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_head", [False, True])
def test_without_supervised_tokens_loss_and_gradients_are_zero(name, train_head):
    x = problem(torch.float32)
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_(train_head)]
    for labels in (torch.full_like(LABELS, -100), LABELS.where(torch.arange(T) == 0, -100)):
        loss, metrics = ours(name, x, labels)
        loss.backward()
        assert loss.item() == 0 and all(value.item() == 0 for value in metrics.values())
        assert all(leaf.grad.abs().sum() == 0 for leaf in leaves if leaf.requires_grad)


def test_a_pair_without_tokens_counts_with_loss_zero():
    """Its gradient share is that of padded code, which adds log 2."""
    x = problem(torch.float64)
    labels = LABELS.clone()
    labels[[1, 3]] = -100  # the second pair
    both = ours("dpo", x, labels)
    alone = fused_dpo(*(x["hidden"][::2], x["weight"], LABELS[::2]), beta=0.3, bias=x["bias"],
                      ref_hidden=x["ref_hidden"][::2], ref_weight=x["ref_weight"])  # fmt: skip
    torch.testing.assert_close(both[0], alone[0] / 2)
    assert both[1]["margin"] == alone[1]["margin"]


def test_reference_as_log_probs_per_token_or_summed():
    x = problem(torch.float64)
    args, head = (x["hidden"], x["weight"], LABELS), {"bias": x["bias"]}
    ref_logp = fused_logp(x["ref_hidden"], x["ref_weight"], LABELS, **head)
    noise = torch.where(MASK, 0.0, torch.nan)  # what lies at ignored labels is not read
    for call, options in ((fused_dpo, {}), (fused_perpo, {"scores": SCORES})):
        ref = {"ref_hidden": x["ref_hidden"], "ref_weight": x["ref_weight"]}
        want = call(*args, **ref, **options, **head)[0]
        for given in (ref_logp + noise, ref_logp.sum(1)):
            torch.testing.assert_close(call(*args, ref_logp=given, **options, **head)[0], want)
        free = call(*args, **options, **head)[0]
        torch.testing.assert_close(free, call(*args, ref_logp=torch.zeros(ROWS), **options, **head)[0])


def test_fused_logp_is_the_gather_of_log_softmax():
    x = problem(torch.float64)
    want = log_probs(x["hidden"], x["weight"], x, {}).gather(-1, LABELS[:, 1:].clamp(min=0)[..., None])[..., 0] * MASK
    x["hidden"].requires_grad_()
    got = fused_logp(x["hidden"], x["weight"], LABELS, bias=x["bias"])
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert (x["hidden"].grad.abs().sum(-1) > 0).equal(F.pad(MASK, (0, 1)))


def test_metrics_are_detached_means():
    x = problem(torch.float64)
    x["hidden"].requires_grad_()
    for name in NAMES:
        loss, metrics = ours(name, x)
        assert loss.requires_grad and loss.ndim == 0
        assert not any(value.requires_grad or value.ndim for value in metrics.values())
    assert set(ours("rrpo", x)[1]) == {"accuracy", "margin", "chosen_reward", "rejected_reward", "kl"}
    assert set(ours("dapo", x)[1]) == {"clip_low", "clip_high", "kl"}
    metrics = ours("dpo", x)[1]
    torch.testing.assert_close(metrics["margin"], metrics["chosen_reward"] - metrics["rejected_reward"])


@pytest.mark.parametrize("name", NAMES)
def test_inputs_need_not_be_contiguous(name):
    x = problem(torch.float64)
    want = ours(name, x)
    x["hidden"], x["ref_hidden"] = (x[k].transpose(0, 1).contiguous().transpose(0, 1) for k in ("hidden", "ref_hidden"))
    x["weight"] = x["weight"].T.contiguous().T
    labels = LABELS.T.contiguous().T
    assert not (x["hidden"].is_contiguous() or x["weight"].is_contiguous() or labels.is_contiguous())
    torch.testing.assert_close(ours(name, x, labels), want)


X = problem(torch.float32)
ARGS = (X["hidden"], X["weight"], LABELS)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fused_grpo(X["hidden"][0], X["weight"], LABELS, ADVANTAGES), r"hidden must be \[rows, T, H\]"),
        (lambda: fused_dpo(X["hidden"][:3], X["weight"], LABELS[:3]), "even number, got 3"),
        (lambda: fused_dpo(X["hidden"], X["weight"], LABELS[:, 1:]), r"labels must be \[4, 9\]"),
        (lambda: fused_dpo(X["hidden"], X["weight"], LABELS + V), r"target must lie in \[0, 37\)"),
        (lambda: fused_dpo(X["hidden"], X["weight"], LABELS.clamp(min=-1)), r"target must lie in \[0, 37\)"),
        (lambda: fused_dpo(*ARGS, ref_hidden=X["hidden"][:2]), r"ref_hidden must be \[4, 9, 11\]"),
        (lambda: fused_dpo(*ARGS, ref_logp=torch.zeros(ROWS, T)), r"ref_logp must be \[4, 8\]"),
        (lambda: fused_dpo(*ARGS, ref_logp=torch.zeros(ROWS), ref_hidden=X["hidden"]), "not both"),
        (lambda: fused_dpo(*ARGS, ref_weight=X["weight"]), "need ref_hidden"),
        (lambda: fused_dpo(*ARGS, beta=0.0), "beta must be positive"),
        (lambda: fused_dpo(*ARGS, backend="none"), "backend 'none' is unknown"),
        (lambda: fused_rrpo(*ARGS, phrase_mask=PHRASES[:, 1:], ref_hidden=X["hidden"]), "phrase_mask must be"),
        (lambda: fused_perpo(*ARGS, scores=SCORES.flatten()), r"scores must be \[B, N\]"),
        (lambda: fused_perpo(*ARGS, scores=torch.zeros(2, 3)), "hidden has 4 rows, scores are for 6"),
        (lambda: fused_grpo(*ARGS, ADVANTAGES[:3]), r"advantages must be \[4\]"),
        (lambda: fused_grpo(*ARGS, ADVANTAGES, old_logp=torch.zeros(ROWS, T)), r"old_logp must be \[4, 8\]"),
        (lambda: fused_grpo(*ARGS, ADVANTAGES, beta=0.1), "needs ref_logp"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
