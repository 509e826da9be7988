"""Whole runs on the tiny model: losses, checkpoints, resuming, ranks, reference modes, bad samples."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpo import fit as fit_module
from fastpo import train
from fastpo.config import load
from fastpo.fit import fit, make_data
from fastpo.merge import merge
from fastpo.sample import BadSample
from tests.ranks import ENVIRONMENT, ROOT

RECIPE = ROOT / "configs" / "rrpo_llavavideo.yaml"


def options(demo: Path, out: Path, *more: str) -> list[str]:
    """The published recipe on the tiny model: paths and sizes overridden, as a user would."""
    return [
        f"out={out}", f"model.path={demo / 'model'}", "model.dtype=float32", "model.lora.r=4",
        f"data.media_root={demo}", f"data.train.path={demo / 'train.json'}", "data.frames=4", "data.workers=0",
        "batch.prompts=4", "batch.tokens=700", "optim.lr=1e-2", "optim.steps=4", "log.tensorboard=false", *more,
    ]  # fmt: skip


def run(demo: Path, out: Path, *more: str) -> list[dict]:
    fit(load(RECIPE, options(demo, out, *more)))
    return rows(out)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(found: list[dict]) -> list[tuple]:
    return [tuple(v for k, v in row.items() if k != "tokens_per_s") for row in found]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(out.glob("checkpoints/step_*"))[-1] / "adapter" / "adapter_model.safetensors")


def command(demo: Path, out: Path, *more: str, ranks: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    return [sys.executable, *launch, "-m", "fastpo.train", str(RECIPE), *options(demo, out, *more)]


@pytest.fixture(scope="module")
def base(demo, tmp_path_factory):
    """Four steps without interruption on one rank."""
    out = tmp_path_factory.mktemp("base")
    return out, run(demo, out)


def test_first_step_is_log_2_and_every_number_is_logged(base):
    _, found = base
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert found[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and found[0]["accuracy"] == 0.5
    assert {"loss", "accuracy", "margin", "kl", "grad_norm", "lr", "tokens_per_s"} <= found[0].keys()
    assert found[0]["lr"] == 0 and found[1]["lr"] == pytest.approx(1e-2)
    assert abs(found[3]["loss"] - found[2]["loss"]) > 1e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one_and_one_continues_what_they_began(base, demo, tmp_path, two_ranks, stage):
    more = (f"engine.zero={stage}", "save_every=2")
    two_ranks(str(RECIPE), *options(demo, tmp_path, *more))
    equal(tmp_path, base)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000004")
    run(demo, tmp_path, *more)
    equal(tmp_path, base)


def equal(out: Path, base: tuple[Path, list[dict]]) -> None:
    folder, found = base
    for name in ("loss", "margin", "kl", "grad_norm"):
        torch.testing.assert_close([r[name] for r in rows(out)], [r[name] for r in found], rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.cat([w.flatten() for w in adapter(made).values()]) for made in (out, folder))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("mode", ["adapter_off", "cache"])
def test_a_rank_without_samples_keeps_in_step(demo, tmp_path, mode, two_ranks):
    """One prompt a step on two ranks: the other rank's micro-batch is empty."""
    more = (f"reference.mode={mode}", "batch.prompts=1", "optim.steps=2")
    one = run(demo, tmp_path / "one", *more)
    two_ranks(str(RECIPE), *options(demo, tmp_path / "two", *more))
    for mine, other in zip(one, rows(tmp_path / "two"), strict=True):
        for name in ("loss", "kl", "grad_norm"):
            assert other[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_stages_agree(base, demo, tmp_path, stage):
    out, found = base
    other = run(demo, tmp_path, f"engine.zero={stage}")
    torch.testing.assert_close([r["loss"] for r in other], [r["loss"] for r in found], rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["copy", "cache"])
def test_reference_modes_agree_with_adapter_off(base, demo, tmp_path, mode):
    out, found = base
    other = run(demo, tmp_path, f"reference.mode={mode}")
    for name in ("loss", "margin", "kl"):
        torch.testing.assert_close([r[name] for r in other], [r[name] for r in found], rtol=1e-4, atol=1e-6)


def test_a_stale_reference_cache_is_refused(demo, tmp_path):
    run(demo, tmp_path, "reference.mode=cache", "optim.steps=1")
    held = next(tmp_path.glob("reference/*.safetensors"))
    assert set(load_file(held)) == {"logp", "hidden"}
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="stale reference cache, frames changed"):
        run(demo, tmp_path, "reference.mode=cache", "optim.steps=1", "data.frames=5", "batch.tokens=900")


def test_killed_and_restarted_equals_uninterrupted_bit_for_bit(base, demo, tmp_path):
    out, found = base
    process = subprocess.Popen(command(demo, tmp_path, "save_every=2"), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "checkpoints" / "step_000002", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "checkpoints" / "step_000004.tmp").mkdir(exist_ok=True)  # a half-written one is not picked up
    (tmp_path / "checkpoints" / "step_000004").exists() and pytest.fail("the run ended before it was killed")
    assert numbers(run(demo, tmp_path, "save_every=2")) == numbers(found)
    assert all(torch.equal(w, adapter(tmp_path)[name]) for name, w in adapter(out).items())


def test_sigterm_saves_and_exits_with_0(demo, tmp_path):
    """Sent to the process group, as a terminal or a scheduler does: the loader's worker stays until the run is done."""
    line = command(demo, tmp_path, "optim.steps=500", "data.workers=1")
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / "metrics.jsonl", process, lambda file: file.read_text().count("\n") >= 2)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM" in output
    last = rows(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / f"step_{last:06d}" / "state.json").exists()


def test_sigterm_without_workers(demo, tmp_path, monkeypatch):
    """In this process, in the middle of its first step."""
    kept, step = signal.getsignal(signal.SIGTERM), fit_module.train_step
    monkeypatch.setattr(
        fit_module, "train_step", lambda *given: (os.kill(os.getpid(), signal.SIGTERM), step(*given))[1]
    )
    try:
        with pytest.raises(SystemExit) as stop:
            train.main([str(RECIPE), *options(demo, tmp_path, "optim.steps=500")])
    finally:
        signal.signal(signal.SIGTERM, kept)
    assert stop.value.code == 0 and [row["step"] for row in rows(tmp_path)] == [1]
    assert (tmp_path / "checkpoints" / "step_000001" / "state.json").exists()


def wait_for(path: Path, process: subprocess.Popen, ready=lambda _: True) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and ready(path)):
        assert process.poll() is None and time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_another_configuration_in_the_same_folder_is_refused(base, demo):
    out, _ = base
    with pytest.raises(ValueError, match=r"another configuration \(differs in optim.lr\)"):
        run(demo, out, "optim.lr=1e-3")


def test_adapter_loads_with_plain_peft_and_merges_to_the_same_model(base, demo, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    out, _ = base
    merge(out / "checkpoints" / "step_000004", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    plain = AutoModelForImageTextToText.from_pretrained(demo / "model")
    folder = out / "checkpoints" / "step_000004" / "adapter"
    adapted = PeftModel.from_pretrained(plain, str(folder)).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("The pole is blue.", return_tensors="pt").input_ids
    base_logits = AutoModelForImageTextToText.from_pretrained(demo / "model").eval()(input_ids=ids).logits
    logits = adapted(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert float((logits - base_logits).abs().max().detach()) > 1e-2


def test_full_fine_tuning_with_a_copy_trains_every_part_and_saves_a_plain_model(demo, tmp_path):
    from transformers import AutoModelForImageTextToText

    parts = (
        "model.lora=null",
        "reference.mode=copy",
        "model.train_vision=true",
        "model.train_projector=true",
        "model.train_head=true",
    )
    found = run(
        demo, tmp_path, *parts, "optim.steps=3", "optim.lr=1e-3", "optim.lr_vision=1e-4", "optim.lr_projector=3e-4"
    )
    assert found[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and found[2]["margin"] != 0
    before = AutoModelForImageTextToText.from_pretrained(demo / "model").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoints" / "step_000003" / "model").state_dict()
    for part in ("vision_tower.encoder", "multi_modal_projector", "image_newline", "language_model.layers", "lm_head"):
        assert any(not torch.equal(before[k], after[k]) for k in before if part in k), part


def test_bad_samples_stop_the_run_or_are_listed(demo, tmp_path):
    table = json.loads((demo / "train.json").read_text())
    table[1] |= {"answer": " "}
    table[2] |= {"media_path": "videos/broken.mp4"}
    data = tmp_path / "train.json"
    data.write_text(json.dumps(table))
    clip = (demo / table[0]["media_path"]).read_bytes()
    broken = demo / "videos" / "broken.mp4"
    broken.write_bytes(clip[: len(clip) // 2])
    with pytest.raises(BadSample, match=r"train.json, row 1, key answer"):
        run(demo, tmp_path / "error", f"data.train.path={data}")
    run(demo, tmp_path / "skip", f"data.train.path={data}", "data.on_bad_sample=skip", "optim.steps=3")
    listed = [json.loads(line) for line in (tmp_path / "skip" / "skipped.jsonl").read_text().splitlines()]
    assert len(listed) == 2 and "broken.mp4" in listed[1]["reason"]
    table[1] |= {"answer": "The pole is blue now."} | {"answer_masked": "The pole is <MASK> blue now </MASK>."}
    data.write_text(json.dumps(table))
    with pytest.raises(BadSample, match=r"broken.mp4"):
        run(demo, tmp_path / "decode", f"data.train.path={data}", "data.workers=1")
    broken.unlink()


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_samples(demo, tmp_path):
    from safetensors.torch import save_file

    model = tmp_path / "model"
    model.mkdir()
    for file in (demo / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    norm = next(name for name in weights if name.endswith("norm.weight") and "layernorm" not in name)
    weights[norm] = weights[norm] * float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"not finite.*train.json:\d+"):
        run(demo, tmp_path / "out", f"model.path={model}")
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_the_demos_data_of_another_seed_are_refused(demo, tmp_path):
    make_data(load(RECIPE, options(demo, tmp_path, f"data.synthetic={demo}")))
    with pytest.raises(ValueError, match=r"data: built with seed 0, not 1; remove the folder or name another one"):
        make_data(load(RECIPE, options(demo, tmp_path, f"data.synthetic={demo}", "seed=1")))


def test_missing_weights_say_what_to_do(demo, tmp_path):
    with pytest.raises(ValueError, match=r"model.path: .*no config.json.*Download"):
        run(demo, tmp_path, f"model.path={tmp_path}")


def test_a_sample_longer_than_a_row_is_named(demo, tmp_path):
    with pytest.raises(BadSample, match=r"train.json:\d+: \d+ tokens, more than batch.tokens: 60"):
        run(demo, tmp_path, "batch.tokens=60")
