"""Whole training steps on prompts with eight images: fastpo against TRL's DPOTrainer, same model, rows and adapters.

Pairs: four prompts with two answers each. List: one prompt with eight scored answers, a PerPO step on all of them,
against the same eight as four pairs, each of which repeats the prompt, which is what a trainer of pairs can do. Both
update by AdamW with LoRA. The losses of the first steps have to agree, and of the list the log-probabilities of every
answer, before anything is timed; then the steps take turns. Rows say how many operations each one makes, counted, and
what share of time and operations each part has; "over_fastpo" is of times, "counted_over_fastpo" of operations.
"""

from typing import Any

import pytest
import torch

from bench import harness, steps
from bench.steps import DTYPE, IMAGES, Ours, Step
from fastpo_kernels.testing import max_error

CHECKED = 4  # optimizer steps whose losses are compared
RELATIVE, ABSOLUTE = {"float32": (1e-4, 1e-5), "bfloat16": (2e-2, 2e-2)}[DTYPE]  # of losses
WORDS = "The third picture shows a red bar above a blue square"
ANSWERS = [WORDS[n : 24 + n] for n in range(8)]
TRL, COMPACT = "TRL", "TRL, head of labelled positions"


@pytest.fixture
def root(tmp_path):
    torch.set_num_threads(1)
    return tmp_path


def bench_pairs_against_trl(root, benchmark, results):
    names = steps.write_pictures(root)
    rows = [
        {"images": names, "prompt": f"What is in picture {n}?", "chosen": better, "rejected": worse}
        for n, (better, worse) in enumerate(_pairs())
    ]
    mine = steps.ours(steps.config(root, rows, "dpo", "llava", {"name": "dpo", "beta": 0.1}))
    peers = _peers(root, rows, mine)
    found = _checked(mine.step, peers)
    _compare(benchmark, results, "dpo step, pairs", {"fastpo": mine.step} | peers, mine, found)


def bench_list_against_trl(root, benchmark, results):
    names, asked = steps.write_pictures(root), "What is in the pictures?"
    rows = [{"images": names, "prompt": asked, "chosen": better, "rejected": worse} for better, worse in _pairs()]
    scores = [1 - n / 8 for n in range(8)]
    listed = [{"images": names, "question": asked, "answers_gen": ANSWERS, "iou_scores": scores}]
    mine = steps.ours(steps.config(root, listed, "perpo", "llava", {"name": "perpo", "beta": 0.1}))
    pairs = steps.ours(steps.config(root, rows, "dpo", "llava", {"name": "dpo", "beta": 0.1}))
    apart, together = _logps(pairs), _logps(mine)
    assert together.shape == (8,) and apart.std() > 0.1
    assert max_error(together, apart) < (1e-4 if DTYPE == "float32" else 1.0), (together, apart)
    peers = _peers(root, rows, pairs)
    found = _checked(pairs.step, peers)
    runs = {"fastpo": mine.step, "fastpo, as pairs": pairs.step} | peers
    _compare(benchmark, results, "perpo step, a list of 8", runs, mine, found)


def _pairs() -> list[list[str]]:
    """Each answer once."""
    return [ANSWERS[n : n + 2] for n in range(0, 8, 2)]


def _peers(root: Any, rows: list[dict[str, Any]], mine: Ours) -> dict[str, Step]:
    as_it_comes, compact = steps.theirs(root, rows, mine.engine.policy)
    return {TRL: as_it_comes} if harness.CUDA else {TRL: as_it_comes, COMPACT: compact}


def _logps(mine: Ours) -> torch.Tensor:
    """[8] log-probability of every answer under the untrained model, in the order of ANSWERS."""
    (batch,) = mine.step.data()
    batch = batch.to(mine.engine.device)
    with torch.no_grad():
        logp = mine.engine.stats(batch)["logp"]
    assert logp is not None
    rank = [int(key.rpartition(":")[2]) for key in batch.keys]
    sums = batch.segments.sum(logp).split(batch.segments.groups.tolist())
    return torch.cat([sums[place] for place in torch.tensor(rank).argsort()])


def _checked(mine: Step, peers: dict[str, Step]) -> list[tuple[float, float]]:
    """Losses of the first steps, ours and theirs; the peers, which share a model, take turns."""
    batch, (first, *_) = mine.data(), peers.values()
    theirs = first.data()
    turns = list(peers.values())
    found = [(mine.train(batch), turns[n % len(turns)].train(theirs)) for n in range(CHECKED)]
    assert found[0][0] == pytest.approx(0.6931, abs=1e-3)
    for got, want in found:
        assert got == pytest.approx(want, rel=RELATIVE, abs=ABSOLUTE), found
    assert found[-1][0] < found[0][0]
    return found


def _compare(
    benchmark: Any, results: Any, bench: str, runs: dict[str, Step], mine: Ours, found: list[tuple[float, float]]
) -> None:
    measured = steps.measure(runs)
    rows_of = [(len(e.prompt), len(response)) for e in mine.table.encoded for response in e.responses]
    prompts, answers = (sum(column) for column in zip(*rows_of, strict=True))
    case = {
        "bench": bench,
        "images": IMAGES,
        "candidates": len(ANSWERS),
        "prompt_share": round(prompts / (prompts + answers), 3),  # of a row of a prompt and one answer
        "dtype": DTYPE,
        "device": harness.device_name(),
        "versions": harness.versions(),
        "losses": [[round(x, 6) for x in pair] for pair in found],
    }
    ours, rows = measured["fastpo"], []
    for name, step in measured.items():
        over = round(step.ms / ours.ms, 2)
        print(step.table(f"{bench}, {name}: {step.ms:.0f} ms, {over} times fastpo's"))
        row = {
            "step": name,
            "ms": round(step.ms, 1),
            "ms_per_candidate": round(step.ms / len(ANSWERS), 1),
            "over_fastpo": over,
            "gflop": round(step.gflop, 2),
            "counted_over_fastpo": round(step.gflop / ours.gflop, 2),
            "peak_mib": round(step.peak_mib, 1),
            "fastpo_memory": round(ours.peak_mib / step.peak_mib, 3),
            "parts": step.parts,
        }
        rows.append(case | row)
    harness.write(results, rows)
    benchmark.extra_info.update({row["step"]: row["over_fastpo"] for row in rows})
    batch = runs["fastpo"].data()
    benchmark.pedantic(runs["fastpo"].train, args=(batch,), rounds=3)
    assert all(ours.gflop <= step.gflop and ours.peak_mib <= step.peak_mib for step in measured.values())
