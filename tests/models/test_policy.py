"""A whole RRPO step, reference included, against the plain Hugging Face way of doing it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastpo.config import Lora, Model
from fastpo.data.pack import pack
from fastpo.models import llava_video, trainable
from fastpo.models.policy import Policy
from fastpo_kernels import LossOut, losses
from tests import tiny
from tests.models.test_llava_video import relative, separate

SHAPES = [(3, 2, 1, [4, 3]), (5, 1, 2, [2, 7])]


def rrpo_plainly(model, reference, samples, *, beta, alpha):
    """The authors' formula on full tables: phrase log-ratios, KL(reference || policy) of the better response."""
    found = []
    for sample in samples:
        sums = []
        for i, (r, weight) in enumerate(zip(sample.responses, sample.weights, strict=True)):
            p, q = separate(model, sample)[1][i], reference(sample)[i]
            sums.append(((p - q).gather(1, r[:, None])[:, 0] * weight).sum())
            if i == 0:
                divergence = (q.exp() * (q - p)).sum()
        found.append(-F.logsigmoid(beta * (sums[0] - sums[1])) + alpha * divergence)
    return torch.stack(found)


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(5)
    return [
        tiny.sample(str(i), generator, before=b, after=a, frames=f, responses=r)
        for i, (b, a, f, r) in enumerate(SHAPES)
    ]


def step(policy, samples):
    batch = pack(samples, tiny.blank())
    stats = policy(batch)
    out = losses.rrpo(stats.logp, stats.ref_logp, stats.kl, batch.segments, beta=0.5, alpha=0.05)
    out.losses.sum().backward()
    return out.losses.detach()


def disturb(model, generator):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_" in name or parameter.ndim > 1):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_with_the_reference_in_the_same_model(samples, checkpointing):
    cfg = Model(path="", lora=Lora(r=4, alpha=8), gradient_checkpointing=checkpointing)
    packed = trainable.prepare(tiny.model(packed=True), llava_video.parts, cfg)
    plain = trainable.prepare(tiny.model(packed=False), llava_video.parts, cfg)
    for model in (packed, plain):
        disturb(model, torch.Generator().manual_seed(6))
    policy = Policy(
        packed, llava_video, tiny.processor(), mode="adapter_off", stats=losses.needs(losses.rrpo), backend="auto"
    ).train()

    def reference(sample):
        with torch.no_grad(), plain.disable_adapter():
            return separate(plain.get_base_model(), sample)[1]

    want = rrpo_plainly(plain.get_base_model(), reference, samples, beta=0.5, alpha=0.05)
    want.sum().backward()
    assert relative(step(policy, samples), want.detach()) < 1e-5
    check_gradients(packed, plain)


def test_full_fine_tuning_of_every_part_with_a_frozen_copy(samples):
    cfg = Model(
        path="", lora=None, train_vision=True, train_projector=True, train_head=True, gradient_checkpointing=False
    )
    packed = trainable.prepare(tiny.model(packed=True), llava_video.parts, cfg)
    plain = trainable.prepare(tiny.model(packed=False), llava_video.parts, cfg)
    frozen, frozen_plain = copy.deepcopy(packed), copy.deepcopy(plain)
    for model in (packed, plain):
        disturb(model, torch.Generator().manual_seed(6))
    policy = Policy(
        packed, llava_video, tiny.processor(), mode="copy", stats=losses.needs(losses.rrpo), reference=frozen
    ).train()

    def reference(sample):
        with torch.no_grad():
            return separate(frozen_plain, sample)[1]

    want = rrpo_plainly(plain, reference, samples, beta=0.5, alpha=0.05)
    want.sum().backward()
    assert relative(step(policy, samples), want.detach()) < 1e-5
    check_gradients(packed, plain)
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def stay_close(logp, reverse_kl, seg):
    """A user's loss that reads KL(policy || reference) of every token and nothing else of the reference."""
    return LossOut(losses=reverse_kl - 0 * logp, unit="token", metrics={})


def test_a_users_loss_of_the_reverse_kl_reads_all_tokens(samples):
    model = trainable.prepare(tiny.model(packed=True), llava_video.parts, Model(path="", lora=Lora(r=4, alpha=8)))
    plain = trainable.prepare(tiny.model(packed=False), llava_video.parts, Model(path="", lora=Lora(r=4, alpha=8)))
    for one in (model, plain):
        disturb(one, torch.Generator().manual_seed(6))
    policy = Policy(model, llava_video, tiny.processor(), mode="adapter_off", stats=losses.needs(stay_close)).eval()
    batch = pack(samples, tiny.blank())
    with torch.no_grad():
        stats = policy(batch)
        found = stay_close(stats.logp, stats.reverse_kl, batch.segments).losses
        p = torch.cat([r for s in samples for r in separate(plain.get_base_model(), s)[1]])
        with plain.disable_adapter():
            q = torch.cat([r for s in samples for r in separate(plain.get_base_model(), s)[1]])
    assert relative(found, (p.exp() * (p - q)).sum(-1)) < 1e-4  # of differences of numbers near 6


def check_gradients(packed, plain):
    theirs, checked = dict(plain.named_parameters()), 0
    for name, parameter in packed.named_parameters():
        wanted = theirs[name].grad
        if wanted is None:
            assert parameter.grad is None, name
            continue
        scale = max(1e-3, float(wanted.abs().max()))
        assert float((parameter.grad - wanted).abs().max()) / scale < 1e-5, name
        checked += 1
    assert checked > 20
