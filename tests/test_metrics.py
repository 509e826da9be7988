"""Means over ranks, rows that survive a kill, and the lines a person sees."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastpo.metrics import Log, Meter, cut, line, say, table


def rows(path):
    return [json.loads(row) for row in path.read_text().splitlines()]


def terminal(**options) -> Console:
    return Console(file=io.StringIO(), width=100, **options)


def test_meter_averages_samples_not_batches():
    meter = Meter(("loss", "accuracy", "never"))
    meter.add("loss", torch.tensor([1.0, 2.0, 6.0], requires_grad=True))
    meter.add("loss", torch.tensor(3.0))
    meter.add("accuracy", torch.tensor([True, False, True]))
    meter.add("accuracy", torch.tensor(5.0), count=7)
    assert meter.reduce() == {"loss": 3.0, "accuracy": 0.7}
    assert meter.reduce() == {}
    assert Meter(()).reduce() == {}


def test_meter_sums_in_float64():
    meter = Meter(("loss",))
    for value in (2.0**24, 1.0, 1.0, 1.0):
        meter.add("loss", torch.tensor(value))
    assert meter.reduce()["loss"] == (2**24 + 3) / 4


RANK = """
import json, sys, torch, torch.distributed as dist
from fastpo.metrics import Meter
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
meter = Meter(("a", "only_0", "only_1", "never"))
meter.add("a", torch.arange(3.0) + rank)
meter.add(f"only_{rank}", torch.tensor([rank + 0.5]))
first = meter.reduce()
if rank == 0:
    meter.add("a", torch.tensor([4.0]))
print(json.dumps([first, meter.reduce(), meter.reduce()]))
dist.destroy_process_group()
"""


def test_two_ranks_agree_though_one_has_no_samples(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE) for rank in range(2)
    ]
    said = [json.loads(rank.communicate(timeout=100)[0]) for rank in ranks]
    assert said[0] == said[1] == [{"a": 1.5, "only_0": 0.5, "only_1": 1.5}, {"a": 4.0}, {}]


def test_rows_are_on_disk_at_once(tmp_path):
    with Log(tmp_path / "new", 2, console=terminal()) as log:
        log.write(0, {"eval/accuracy": 0.5})
        log.write(1, {"loss": 0.7, "grad_norm": float("inf")})
        expected = [{"step": 0, "eval/accuracy": 0.5}, {"step": 1, "loss": 0.7, "grad_norm": None}]
        assert rows(tmp_path / "new" / "metrics.jsonl") == expected
    board = EventAccumulator(str(tmp_path / "new" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("eval/accuracy")] == [(0, 0.5)]
    assert board.Scalars("loss")[0].value == pytest.approx(0.7)


def test_a_new_run_starts_anew_and_a_resumed_one_goes_on(tmp_path):
    def run(steps, **options):
        with Log(tmp_path, 5, tensorboard=False, console=terminal(), **options) as log:
            for step in steps:
                log.write(step, {"loss": step + options.get("resume_step", 0) / 10})

    run([1, 2, 3])
    run([1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run([3, 4], resume_step=2)
    assert [(r["step"], r["loss"]) for r in rows(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 3.2), (4, 4.2)]
    assert not (tmp_path / "tensorboard").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_keeps_a_whole_last_row_without_its_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}')
    cut(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("broken", ['{"step": 1', "{}", "[1]", ""])
def test_cut_refuses_a_broken_row_in_the_middle(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + broken + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: not a row of metrics"):
        cut(path, 5)
    assert path.read_text().endswith('{"step": 2}\n')


def test_other_ranks_write_nothing(tmp_path):
    with Log(tmp_path / "out", 2, enabled=False, wandb="project") as log:
        log.write(1, {"loss": 1.0})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("every, steps", [(0.0, [1, 2, 3, 4]), (1000.0, [1, 4])])
def test_without_a_terminal_lines_are_rare(tmp_path, every, steps):
    console = terminal(force_terminal=False)
    with Log(tmp_path, 4, tensorboard=False, console=console, every=every) as log:
        log.write(0, {"eval/accuracy": 0.5})
        for step in range(1, 5):
            log.write(step, {"loss": 1.0, "accuracy": 0.5})
    said = console.file.getvalue().splitlines()
    assert said[0] == "step 0/4  eval/accuracy 0.5"
    assert [text.split("  ")[:2] for text in said[1:]] == [[f"step {s}/4", "loss 1"] for s in steps]


def test_time_left_counts_from_the_evaluation_before_the_first_step(tmp_path, monkeypatch):
    clock = iter([100.0, 160.0, 164.0])
    monkeypatch.setattr("fastpo.metrics.time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = terminal(force_terminal=False)
    with Log(tmp_path, 4, tensorboard=False, console=console, resume_step=1) as log:
        log.write(1, {"eval/accuracy": 0.5})
        log.write(2, {"loss": 1.0})
    assert console.file.getvalue().splitlines()[1] == "step 2/4  loss 1  ETA 0:00:08"


def test_on_a_terminal_the_line_is_rewritten(tmp_path):
    console = terminal(force_terminal=True)
    with Log(tmp_path, 2, tensorboard=False, console=console) as log:
        log.write(1, {"loss": 0.25, "accuracy": 0.5})
        log.write(2, {"loss": 0.125, "accuracy": 0.5})
    assert "step 2/2  loss 0.125  accuracy 0.5  ETA 0:00:00" in console.file.getvalue()


def test_line_shows_what_a_person_watches():
    values = {"loss": 0.69314, "accuracy": 0.5, "margin": -0.0123, "lr": 5e-6, "tokens_per_s": 12345.6}
    assert (
        line(3, 30, values, 75.2)
        == "step 3/30  loss 0.6931  accuracy 0.5  margin -0.0123  12,346 tokens/s  ETA 0:01:15"
    )
    assert (
        line(3, 30, {"eval/accuracy": 0.9375, "eval/margin": 2.0}) == "step 3/30  eval/accuracy 0.9375  eval/margin 2"
    )


def test_wandb_missing_or_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.wandb: .*pip install 'fastpo\[wandb\]'"):
        Log(tmp_path, 2, wandb="project")
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb.py").write_text(
        "said = []\n"
        "def init(**options): said.append(options); return __import__('wandb')\n"
        "def log(values, step): said.append((step, values))\n"
        "def finish(): said.append('finish')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Log(tmp_path / "out", 2, wandb="project", tensorboard=False, run={"seed": 1}, console=terminal()) as log:
        log.write(1, {"loss": 1.0})
    started = {"project": "project", "name": "out", "dir": str(tmp_path / "out"), "config": {"seed": 1}}
    assert sys.modules["wandb"].said == [started, (1, {"loss": 1.0}), "finish"]


def test_table_has_a_column_per_key():
    console = terminal()
    table("held-out clips", [{"when": "before", "accuracy": 0.5}, {"when": "after", "accuracy": 0.984375}], console)
    said = console.file.getvalue()
    assert all(word in said for word in ("held-out clips", "when", "accuracy", "before", "0.5", "after", "0.9844"))
    table("nothing", [], console)


def test_what_is_said_is_printed_as_it_is(capsys):
    say("  prompts.json:100: 'red [bold] :smile:' reward 1")
    assert capsys.readouterr().out == "  prompts.json:100: 'red [bold] :smile:' reward 1\n"
