"""One RRPO forward and backward: packed, against the plain Hugging Face way of the same step.

The plain way is what the authors' trainer does: policy and reference, better and worse response: four vision encodes,
four forwards, full logits. Both run in one process on the same weights and rows, and their losses and adapter gradients
are compared before anything is timed. Rows go to bench/results/<device>.jsonl.
"""

import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import harness
from fastpo.config import load
from fastpo.data import loader, synthetic
from fastpo.fit import make_feed
from fastpo.models import llava_video, trainable
from fastpo.models.attention import register
from fastpo.models.policy import Policy
from fastpo_kernels import losses

ROOT = Path(__file__).parent.parent
FRAMES = 32  # 384 visual tokens: prompts are about 95 % of the packed tokens
SAMPLES = 4


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The demo model with random adapters, twice (packed and plain), and one packed row of four samples."""
    torch.set_num_threads(1)
    data = tmp_path_factory.mktemp("bench") / "data"
    synthetic.write(data, 0, train=SAMPLES, test=2)
    overrides = [f"out={data}", f"model.path={data}/model", f"data.media_root={data}", f"data.frames={FRAMES}"]
    overrides += [f"data.train.path={data}/train.json", "data.workers=0", "batch.tokens=8192", "warmup=null"]
    run = load(ROOT / "configs" / "demo.yaml", overrides)
    feed = make_feed(run, rank=0, ranks=1)
    table = feed.read(run.data.train)
    ((batch,),) = feed.windows(table, loader.in_order(SAMPLES, SAMPLES))
    processor = llava_video.processor(run.model)
    packed, plain = adapted(run, "auto"), adapted(run, "sdpa")
    policy = Policy(
        packed, llava_video, processor, mode="adapter_off", stats=losses.needs(losses.rrpo), backend=run.backend
    )
    by_key = {e.key: e for e in table.encoded}
    encoded = [by_key[key] for key in batch.keys]  # packing sorts by length
    return SimpleNamespace(batch=batch, policy=policy, plain=plain, processor=processor, encoded=encoded)


def adapted(run, attention):
    model = llava_video.load(run.model)
    model.set_attn_implementation({"text_config": register("auto") if attention == "auto" else attention})
    model = trainable.prepare(model, llava_video.parts, run.model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    return model.train()


def packed_step(job):
    job.policy.zero_grad()
    stats = job.policy(job.batch)
    out = losses.rrpo(stats.logp, stats.ref_logp, stats.kl, job.batch.segments, beta=0.1, alpha=0.01).losses
    out.mean().backward()
    return out.detach()


def plain_step(job):
    """Padded rows of the better and of the worse responses, one vision encode and one forward with full logits each."""
    job.plain.zero_grad()
    model = job.plain.get_base_model()
    encoded, pixels, grid = job.encoded, job.batch.pixels, job.batch.grid
    weights = iter(job.batch.segments.weight.split([len(r) for e in encoded for r in e.responses]))
    phrase = [[next(weights) for _ in e.responses] for e in encoded]

    def logits(side):
        tokens = llava_video.vision(model, job.processor, pixels, grid)
        rows = [torch.cat([e.prompt, e.responses[side]]) for e in encoded]
        longest = max(map(len, rows))
        ids = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (0, longest - len(row))) for row in rows])
        shown = (ids == job.processor.video_token_id)[..., None]
        embeddings = model.get_input_embeddings()(ids).masked_scatter(shown, tokens)
        full = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        return full[:, :-1].float().log_softmax(-1)

    def per_response(table, side):
        for row, e in zip(table, encoded, strict=True):
            first = len(e.prompt) - 1
            yield row[first : first + len(e.responses[side])]

    with torch.no_grad(), job.plain.disable_adapter():
        reference = [logits(side) for side in (0, 1)]
    policy = [logits(side) for side in (0, 1)]
    margins, divergences = [], []
    for i, e in enumerate(encoded):
        sums = []
        for side in (0, 1):
            p, q = (list(per_response(t[side], side))[i] for t in (policy, reference))
            picked = (p - q).gather(1, e.responses[side][:, None])[:, 0]
            sums.append((picked * phrase[i][side]).sum())
            if side == 0:
                divergences.append((q.exp() * (q - p)).sum())
        margins.append(sums[0] - sums[1])
    out = -F.logsigmoid(0.1 * torch.stack(margins)) + 0.01 * torch.stack(divergences)
    out.mean().backward()
    return out.detach()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def bench_packed_step_against_plain(job, benchmark, results):
    ours, theirs = packed_step(job), plain_step(job)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    g, h = gradients(job.policy.model), gradients(job.plain)
    assert float((g - h).norm() / h.norm()) < 1e-4

    steps = {"packed": lambda: packed_step(job), "plain": lambda: plain_step(job)}
    seconds = {name: statistics.median(found) / 1e3 for name, found in harness.take_turns(steps).items()}
    peaks = {name: harness.peak_bytes(step) for name, step in steps.items()}
    prompt = sum(len(e.prompt) for e in job.encoded)
    row = {
        "bench": "rrpo step, demo model",
        "device": harness.device_name(),
        "versions": harness.versions(),
        "prompt_share": round(prompt / sum(e.tokens for e in job.encoded), 3),
        "time_ratio": round(seconds["plain"] / seconds["packed"], 2),
        "memory_ratio": round(peaks["packed"] / peaks["plain"], 3),
        "packed_s": round(seconds["packed"], 3),
        "plain_s": round(seconds["plain"], 3),
        "packed_mib": round(peaks["packed"] / 2**20, 1),
        "plain_mib": round(peaks["plain"] / 2**20, 1),
    }
    harness.write(results, [row])
    print(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(packed_step, args=(job,), rounds=3, warmup_rounds=1)
    assert peaks["packed"] < peaks["plain"]
