"""What every benchmark shares: variants checked against float64, timed in turns in one process, written as JSON rows.

A bench gives `compare` a dict of variants, ours first and named "fastpo ...". A variant that is a string instead is a
peer that does not run here, with the reason; it becomes a row too, as does a variant that fails or is wrong. Where that
is one of ours the benchmark fails, after the rows of the others are written.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo_kernels.testing import assert_no_worse, max_error

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CUDA_BYTES = 70e9  # what a benchmark may take; a peer that wants more is a row with its error
SECONDS = 2.0 if CUDA else 5.0  # of timing per case: at least ROUNDS[0] turns of every variant, at most ROUNDS[1]
ROUNDS = (5, 30)
WARM_UP = 2 if CUDA else 0  # after the run that checks
L2_BYTES = 256 << 20  # written between runs on CUDA: five times the L2 cache of an H100
PEER_BOUND = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}  # of max |exact|
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn")
GEMMS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::baddbmm": (1, 2),
}

Outputs = dict[str, Tensor]


class Variant(NamedTuple):
    run: Callable[[], Any]  # a whole forward and backward
    read: Callable[[Any], Outputs] = lambda out: out  # its result in the layout of the exact one; not timed


Variants = Mapping[str, Variant | str]


def compare(
    benchmark: Any,
    results: Path,
    bench: str,
    case: dict[str, Any],
    variants: Variants,
    *,
    exact: Outputs,
    plain: str,
    tokens: int,
    checked: Variants | None = None,
    floor: Callable[[], Any] | None = None,
    gemm: tuple[int, int, int] | None = None,
) -> list[dict[str, Any]]:
    """Rows of one case, appended to results/<device>.jsonl, with our first variant as the figure of pytest-benchmark.

    exact: outputs in float64; plain: the variant of ordinary eager code, which bounds our error. checked: the variants
    at the size of `exact`, where that is not the size that is timed (None: the same). floor: the least work, timed in
    the same turns. With `gemm` it is one pass, a plain matrix product of those rows, H and V, and the ratio is to as
    many of them as the variant makes; without, it is all of the work.
    """
    torch.set_num_threads(1)
    if CUDA:
        memory = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CUDA_BYTES / memory))
    errors = check(variants if checked is None else checked, exact, plain)
    alive = {name: variants[name] for name, found in errors.items() if isinstance(found, dict)}
    failed = {name: found for name, found in errors.items() if isinstance(found, str)}
    runs: dict[str, Callable[[], Any]] = {}
    for name, variant in alive.items():
        assert isinstance(variant, Variant)
        if checked is not None and (reason := _fails(variant.run)):
            failed[name] = reason
        else:
            runs[name] = variant.run
    ours = next(iter(variants))
    assert ours.startswith("fastpo") and ours in runs, f"the first variant is {ours}: {failed.get(ours, 'runs')}"
    times = take_turns(runs | ({"floor": floor} if floor else {}))
    common = {"bench": bench, **case, "device": device_name(), "date": date.today().isoformat(), "versions": versions()}
    rows = []
    for name in variants:
        row = common | {"variant": name}
        if name in failed:
            rows.append(row | {"skip": failed[name]})
            continue
        deciles = statistics.quantiles(times[name], n=10, method="inclusive")
        median = statistics.median(times[name])
        row |= {"ms": _round(median), "p10": _round(deciles[0]), "p90": _round(deciles[-1])}
        row |= {
            "tokens_per_s": round(tokens / median * 1e3),
            "over_fastpo": _round(median / statistics.median(times[ours])),
        }
        if floor:
            least, passes = statistics.median(times["floor"]), gemm_passes(runs[name], *gemm) if gemm else 1
            row |= {"floor_ms": _round(least)}
            row |= {"over_floor": _round(median / (passes * least))} if passes else {}  # 0: all inside of Triton
            row |= {"passes": round(passes, 2)} if gemm else {}
        row |= {"peak_mib": round(peak_bytes(runs[name]) / 2**20, 1)}
        measured = errors[name]
        assert isinstance(measured, dict)
        rows.append(row | {"error": {key: _round(value) for key, value in measured.items()}})
    write(results, rows)
    if benchmark is not None:
        keys = ("passes", "over_floor", "peak_mib")
        benchmark.extra_info.update({row["variant"]: row.get("over_fastpo", row.get("skip")) for row in rows})
        benchmark.extra_info.update({key: rows[0][key] for key in keys if key in rows[0]})
        benchmark.pedantic(lambda: (runs[ours](), synchronize()), rounds=3, warmup_rounds=1)
    wrong = {name: reason for name, reason in failed.items() if name.startswith("fastpo")}
    assert not wrong, wrong
    return rows


def check(variants: Variants, exact: Outputs, plain: str) -> dict[str, dict[str, float] | str]:
    """Largest error of each output over the largest |exact|; a reason for a variant that fails or is wrong.

    Ours is wrong where it is further from float64 than twice the plain variant, a peer by PEER_BOUND.
    """
    found: dict[str, dict[str, float] | str] = {}
    expected = variants[plain]
    assert isinstance(expected, Variant)
    eager = expected.read(expected.run())
    for name, variant in variants.items():
        if isinstance(variant, str):
            found[name] = variant
            continue
        out: Outputs = {}
        if reason := _fails(lambda variant=variant, out=out: out.update(variant.read(variant.run()))):
            found[name] = reason
            continue
        assert out.keys() == exact.keys(), f"{name} gives {list(out)}, exact is {list(exact)}"
        if name.startswith("fastpo"):
            if reason := _fails(lambda out=out: _no_worse(out, eager, exact)):
                found[name] = reason
                continue
        errors = {key: max_error(value, exact[key]) / exact[key].abs().max().item() for key, value in out.items()}
        bound = max(PEER_BOUND[value.dtype] for value in out.values())
        worst = max(errors, key=errors.__getitem__)
        found[name] = errors if errors[worst] <= bound else f"wrong: error of {worst} {errors[worst]:.2g} > {bound}"
    return found


def _no_worse(out: Outputs, plain: Outputs, exact: Outputs) -> None:
    for key, value in out.items():
        assert_no_worse(value, plain[key], exact[key], eps=8 * torch.finfo(value.dtype).eps, what=key)


def take_turns(runs: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Milliseconds of every run, in rounds that each start with another one, so that a busy machine slows all."""
    names = list(runs)
    for name in names * WARM_UP:
        runs[name]()
    scratch = torch.empty(L2_BYTES, dtype=torch.uint8, device=DEVICE) if CUDA else None
    once = sum(_milliseconds(runs[name], scratch) for name in names) / 1e3
    rounds = min(max(int(SECONDS / once), ROUNDS[0]), ROUNDS[1])
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_milliseconds(runs[name], scratch))
    return times


def _milliseconds(run: Callable[[], Any], scratch: Tensor | None) -> float:
    if scratch is None:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    scratch.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _fails(run: Callable[[], Any]) -> str | None:
    """Why something does not run, in one line."""
    try:
        run()
        synchronize()
    except Exception as error:  # peers raise what they like
        if CUDA:
            torch.cuda.empty_cache()
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
    return None


def gemm_passes(run: Callable[[], Any], rows: int, size: int, vocabulary: int) -> float:
    """Matrix products of run() in passes of 2 * rows * size * vocabulary operations, from the profiler's shapes.

    Compiled code refuses the dispatch mode of fastpo_kernels.testing.gemm_passes; products inside of Triton kernels are
    in neither.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    products = [(e.input_shapes, *GEMMS[e.name]) for e in profile.events() or () if e.name in GEMMS and e.input_shapes]
    return sum(prod(shapes[a]) * shapes[b][-1] for shapes, a, b in products) / (rows * size * vocabulary)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Largest sum of live tensor bytes that run() allocated on top of what was there."""
    if CUDA:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    recorded: Any = profile.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def device_name() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = (
        [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)}, {models[0] if models else platform.machine()}"


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(results: Path, rows: list[dict[str, Any]]) -> None:
    """Appends to results/cpu.jsonl, or on CUDA to a file named after the GPU, and prints what the rows say."""
    results.mkdir(parents=True, exist_ok=True)
    slug = "-".join(device_name().lower().split()) if CUDA else "cpu"
    with (results / f"{slug}.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _round(x: float) -> float:
    return float(f"{x:.3g}")
