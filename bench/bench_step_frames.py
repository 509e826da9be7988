"""A DPO step on one video of 16 to 64 frames: whether time grows as the tokens do, and which parts it goes to.

One LLaVA-Video, LoRA, one pair of answers. All but attention is linear in tokens; attention's share of the counted
operations is in the rows. Time per token may grow by what the operations per token do: that is "counted_over_16", to be
held against "over_16", the measured one. Data, the frames' decoding, is a part of its own and in neither.
"""

import pytest
import torch

from bench import harness, steps
from bench.steps import DTYPE
from fastpo.fit import make_feed

FRAMES = (16, 32, 48, 64)
BOUND = 1.25  # operations per token at 64 frames over those at 16


@pytest.fixture
def root(tmp_path):
    torch.set_num_threads(1)
    return tmp_path


def bench_step_by_frames(root, benchmark, results):
    clip = steps.write_video(root, FRAMES[-1])
    better, worse = "The red square moves to the left.", "The blue pole moves up."
    rows = [{"video": clip, "prompt": "What moves in the video?", "chosen": better, "rejected": worse}]
    made = [
        steps.config(root, rows, "dpo", "llava_video", {"name": "dpo", "beta": 0.1}, frames=frames) for frames in FRAMES
    ]
    ours = steps.ours(made[-1])  # trains on all of them
    feeds = [make_feed(run, 0, 1) for run in made]
    tables = [feed.read(run.data.train) for feed, run in zip(feeds, made, strict=True)]
    runs = {
        f"{frames} frames": ours.step._replace(data=steps.batches(feed, table))
        for frames, feed, table in zip(FRAMES, feeds, tables, strict=True)
    }
    measured, found = steps.measure(runs), []
    tokens = [sum(e.tokens for e in table.encoded) for table in tables]
    first, *_ = measured.values()
    for n, (name, step) in enumerate(measured.items()):
        growth = tokens[n] / tokens[0]
        row = {
            "bench": "dpo step, one video",
            "step": name,
            "tokens": tokens[n],
            "dtype": DTYPE,
            "device": harness.device_name(),
            "versions": harness.versions(),
            "ms": round(step.ms, 1),
            "us_per_token": round(1e3 * step.ms / tokens[n], 1),
            "over_16": round(step.ms / first.ms / growth, 3),
            "gflop": round(step.gflop, 2),
            "counted_over_16": round(step.gflop / first.gflop / growth, 3),
            "attention_share": round(step.attention / step.gflop / 1e9, 3),
            "peak_mib": round(step.peak_mib, 1),
            "parts": step.parts,
        }
        print(step.table(f"{name}, {tokens[n]} tokens: {step.ms:.0f} ms, {row['over_16']} a token of 16 frames'"))
        found.append(row)
    harness.write(results, found)
    benchmark.extra_info.update({row["step"]: row["us_per_token"] for row in found})
    batch = runs["16 frames"].data()
    benchmark.pedantic(ours.step.train, args=(batch,), rounds=3)
    assert tokens == sorted(tokens) and tokens[-1] > 3 * tokens[0]
    assert found[-1]["counted_over_16"] < BOUND
    assert 1 - first.attention / first.gflop / 1e9 > 0.8  # else the figures say nothing about the rest
