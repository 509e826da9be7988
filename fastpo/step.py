"""One optimizer step and one evaluation, whatever the loss."""

from collections.abc import Callable, Iterable

import torch

from fastpo.engine import Engine
from fastpo.metrics import Meter
from fastpo.sample import MicroBatch
from fastpo_kernels import LossOut, Segments, losses


def train_step(
    engine: Engine, window: list[MicroBatch], objective: Callable[..., LossOut], meter: Meter
) -> dict[str, float]:
    """Forward and backward of every micro-batch, then one update.

    Units are counted over all ranks before the first backward and divided by once: the result does not depend on how
    the samples were split. Raises FloatingPointError before the update where a loss is not finite, naming the samples.
    """
    totals = _totals(engine, window)
    finite = []
    for i, batch in enumerate(window):
        out = evaluate(engine, batch, objective)
        record(meter, out)
        loss = out.losses.sum() / max(1.0, totals[out.unit])
        finite.append(loss.detach().isfinite())
        engine.backward(loss, last=i == len(window) - 1)
    bad = [key for batch, ok in zip(window, torch.stack(finite).tolist(), strict=True) if not ok for key in batch.keys]
    if engine.all_sum([float(len(bad))])[0]:
        raise FloatingPointError(
            f"the loss is not finite; samples in its micro-batch: {', '.join(bad) or '(on another rank)'}"
        )
    return engine.step()


@torch.no_grad()
def eval_pass(
    engine: Engine, windows: Iterable[list[MicroBatch]], objective: Callable[..., LossOut], meter: Meter
) -> dict[str, float]:
    """Means of loss and metrics over a data set."""
    engine.train(False)
    for window in windows:
        for batch in window:
            record(meter, evaluate(engine, batch, objective))
    engine.train()
    return meter.reduce()


def evaluate(engine: Engine, batch: MicroBatch, objective: Callable[..., LossOut]) -> LossOut:
    """The loss of one micro-batch from the statistics that its signature asks for."""
    batch = batch.to(engine.device)
    found = engine.stats(batch) | dict(batch.given)
    return objective(**{name: found.get(name) for name in losses.needs(objective)}, seg=batch.segments)


def meter_for(objective: Callable[..., LossOut], device: torch.device | str, more: tuple[str, ...] = ()) -> Meter:
    """A meter for the loss and its metrics, whose names come from a call without samples, and for `more`."""
    nothing = torch.zeros(0)
    out = objective(
        **dict.fromkeys(losses.needs(objective), nothing),
        seg=Segments.build(tokens=[], groups=[], score=nothing, weight=nothing),
    )
    return Meter(("loss", *out.metrics, *more), device)


def record(meter: Meter, out: LossOut) -> None:
    for name, values in {"loss": out.losses, **out.metrics}.items():
        meter.add(name, values)


def _totals(engine: Engine, window: list[MicroBatch]) -> dict[str, float]:
    counts = [_units(batch.segments) for batch in window]
    units = ("token", "response", "prompt", "pair")
    return dict(zip(units, engine.all_sum([float(sum(c[u] for c in counts)) for u in units]), strict=True))


def _units(seg: Segments) -> dict[str, int]:
    return {"token": len(seg.owner), "response": len(seg.tokens), "prompt": len(seg.groups), "pair": seg.pairs.shape[1]}
