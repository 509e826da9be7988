"""Means over all ranks, and where they go: metrics.jsonl, TensorBoard, W&B, the terminal."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor


class Meter:
    """Sums and counts kept on the device; nothing syncs before `reduce`.

    names: every name of every rank, the same tuple on all of them, so that a rank without samples takes part
    in the one all-reduce.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu"):
        self._row = {name: i for i, name in enumerate(names)}
        self._totals = torch.zeros(len(self._row), 2, dtype=torch.float64, device=device)  # sum, count

    def add(self, name: str, value: Tensor, count: int | Tensor | None = None) -> None:
        """value: samples of any shape, each counting once; or, with count, what count samples add up to."""
        row = self._totals[self._row[name]]
        row[0] += value.detach().sum(dtype=torch.float64)
        row[1] += value.numel() if count is None else count

    def reduce(self) -> dict[str, float]:
        """Mean of each name over all ranks since the last call; names without samples are left out. Collective."""
        totals, self._totals = self._totals, torch.zeros_like(self._totals)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        sums = dict(zip(self._row, totals.tolist(), strict=True))
        return {name: total / count for name, (total, count) in sums.items() if count}


class Log:
    """Writes one row of numbers per step. A context manager; with enabled=False (ranks other than 0) it does nothing.

    out: folder of metrics.jsonl (keys step and those given; a number that is not finite becomes null) and tensorboard/.
    total: steps of the run. resume_step: None starts metrics.jsonl anew; k keeps its rows up to step k.
    wandb: a W&B project. run: the resolved configuration, for W&B. every: seconds between lines off a terminal.
    Raises ValueError if wandb is asked for and not installed, or if metrics.jsonl has a broken row before its last.
    """

    def __init__(
        self,
        out: Path,
        total: int,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        resume_step: int | None = None,
        run: dict[str, Any] | None = None,
        enabled: bool = True,
        console: Console | None = None,
        every: float = 5.0,
    ):
        self._enabled, self._total, self._every = enabled, total, every
        if not enabled:
            return
        self._wandb = _wandb_run(wandb, out, run) if wandb else None
        out.mkdir(parents=True, exist_ok=True)
        rows = out / "metrics.jsonl"
        if resume_step is None:
            rows.unlink(missing_ok=True)
        else:
            cut(rows, resume_step)
        self._file = rows.open("a", encoding="utf-8")
        self._board = _board(out / "tensorboard", resume_step) if tensorboard else None
        self._console = console or Console()
        self._first, self._start, self._printed = resume_step or 0, time.monotonic(), -math.inf
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(BarColumn(20), TextColumn("{task.description}"), console=self._console)
            self._task = self._bar.add_task(f"step {self._first}/{total}", total=total, completed=self._first)
            self._bar.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """step: optimizer steps done. values: loss, accuracy, margin, grad_norm, lr, tokens_per_s, eval/accuracy."""
        if not self._enabled:
            return
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)
        self._show(step, values)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        now, trained = time.monotonic(), "loss" in values
        done = step - self._first
        if done == 0:
            self._start = now  # the evaluation before the first step is not part of a step
        eta = (now - self._start) / done * (self._total - step) if trained and done > 0 else None
        text = line(step, self._total, values, eta)
        if self._bar and trained:
            self._bar.update(self._task, completed=step, description=text)
        elif not trained or step >= self._total or now - self._printed >= self._every:
            self._console.print(text, highlight=False, soft_wrap=True)
            self._printed = now if trained else self._printed

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._enabled:
            return
        self._file.close()
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def line(step: int, total: int, values: Mapping[str, float], eta: float | None = None) -> str:
    """One line for a person. eta: seconds left. Rows without a loss (an evaluation) show all their numbers."""
    names = [k for k in ("loss", "accuracy", "margin") if k in values] if "loss" in values else list(values)
    parts = [f"step {step}/{total}", *(f"{name} {values[name]:.4g}" for name in names)]
    if "loss" in values and "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    if eta is not None:
        parts.append(f"ETA {timedelta(seconds=round(eta))}")
    return "  ".join(parts)


def cut(path: Path, step: int) -> None:
    """Drops the rows of a metrics.jsonl after `step`, in one rename, and a last row that was half written.

    Raises ValueError for any other row that is not JSON with a step.
    """
    if not path.exists():
        return
    rows, kept = path.read_text(encoding="utf-8").splitlines(), []
    for number, row in enumerate(rows, start=1):
        try:
            if json.loads(row)["step"] <= step:
                kept.append(row + "\n")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(rows):
                raise ValueError(f"{path}:{number}: not a row of metrics: {row[:80]!r}") from error
    whole = path.with_suffix(".tmp")
    whole.write_text("".join(kept), encoding="utf-8")
    os.replace(whole, path)


def say(text: str) -> None:
    """To the terminal as it is: rich would take ":100:" in a sample's key for an emoji."""
    Console(markup=False, emoji=False, highlight=False).print(text, soft_wrap=True)


def list_skipped(out: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Appends (key, reason) of samples left out to out/skipped.jsonl."""
    if rows:
        with (out / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in rows)


def table(title: str, rows: Sequence[Mapping[str, object]], console: Console | None = None) -> None:
    """Prints rows with the same keys; the keys of the first are the columns. Floats get four digits."""
    grid = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        grid.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        grid.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    (console or Console()).print(grid)


def _board(folder: Path, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)


def _wandb_run(project: str, out: Path, run: dict[str, Any] | None) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("log.wandb: W&B is not installed: pip install 'fastpo[wandb]'") from None
    out.mkdir(parents=True, exist_ok=True)
    return wandb.init(project=project, name=out.name, dir=str(out), config=run)
