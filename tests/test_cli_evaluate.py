"""`python -m fastpo.evaluate`: against what training logs of the same weights, and against rewards by hand."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from fastpo import evaluate, rewards
from fastpo.config import load
from fastpo.fit import fit
from fastpo.merge import merge
from fastpo.models.trained import open_model
from tests.test_fit import RECIPE, options
from tests.test_fit import rows as steps


def arguments(demo, out, *more):
    held_out = f"data.eval={{name: rrpo, path: {demo / 'test.json'}}}"
    return options(demo, out, held_out, "optim.steps=2", "optim.lr=3e-2", "optim.warmup=0", "data.frames=2", *more)


def found(demo, folder, out, *more):
    file = out / "found.json"
    evaluate.main([str(RECIPE), *arguments(demo, out), "--out", str(file), "--adapter", str(folder), *more])
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """(run's folder, checkpoint, overrides): LoRA and a trained projector, with a copied reference."""
    out = tmp_path_factory.mktemp("evaluate")
    more = ["reference.mode=copy", "model.train_projector=true"]
    return out, fit(load(RECIPE, arguments(demo, out, *more))), more


def test_preferences_are_those_that_the_run_measured_at_its_end(trained, demo, capsys):
    out, checkpoint, more = trained
    mine = found(demo, checkpoint, out, *more)
    logged = {k.removeprefix("eval/"): v for k, v in steps(out)[-1].items() if k.startswith("eval/")}
    assert abs(logged["loss"] - 0.6931472) > 1e-3 and mine["rows"] == 6
    for name in ("loss", "accuracy", "margin"):
        assert mine["metrics"][name] == pytest.approx(logged[name], rel=1e-5, abs=1e-6)
    assert "accuracy" in capsys.readouterr().out


def test_without_its_adapter_the_model_is_its_own_reference(trained, demo, tmp_path):
    """The projector left as it was: then a copy of the untrained model is no other reference."""
    out, checkpoint, _ = trained
    alone = tmp_path / "adapter"
    shutil.copytree(checkpoint / "adapter", alone, ignore=shutil.ignore_patterns("trained_parts*"))
    mine, copied = (found(demo, alone, out, f"reference.mode={mode}")["metrics"] for mode in ("adapter_off", "copy"))
    assert mine == pytest.approx(copied, rel=1e-5, abs=1e-6) and abs(mine["margin"]) > 1e-4


def test_answers_of_an_adapter_are_those_of_the_merged_model(trained, demo, tmp_path):
    out, checkpoint, more = trained
    merge(checkpoint, tmp_path / "merged")
    prompts = f"data.eval={{name: rollout, path: {demo / 'test.json'}, prompt: question, truth: answer}}"
    scored = ["--metric", "ocr", "--metric", "{name: token_f1}", "generation.max_tokens=5", prompts]
    first = found(demo, checkpoint, out, *more, *scored)
    second = found(demo, tmp_path / "merged", out, *more, *scored)
    untouched = found(demo, demo / "model", out, *more, *scored)
    assert first["answers"] == second["answers"] != untouched["answers"]
    for name, value in first["metrics"].items():
        own = [rewards.REWARDS[name](row["answer"], row["truth"]) for row in first["answers"]]
        assert value == pytest.approx(sum(own) / 6)


def test_an_adapters_weights_are_in_the_opened_model(trained, demo):
    out, checkpoint, more = trained
    opened = open_model(load(RECIPE, arguments(demo, out, *more)).model, checkpoint)
    state = opened.core.state_dict()
    for name, weight in load_file(checkpoint / "adapter" / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert (state[name] == weight).all() and weight.abs().sum() > 0
    for name, weight in load_file(checkpoint / "adapter" / "trained_parts.safetensors").items():
        assert (state[name] == weight).all()
    assert not opened.model.training and not any(p.requires_grad for p in opened.model.parameters())


def test_what_cannot_be_evaluated_is_said(demo, tmp_path, capsys):
    for more, message in (
        ([], "--adapter"),
        (["data.eval=null"], "data.eval: not given"),
        (["--metric", "iou"], "rewards.0"),
        (["--metric", "box_iou"], "row 0, key truth: reward box_iou"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main([str(RECIPE), *arguments(demo, tmp_path), "generation.max_tokens=2", *more])
        assert message in capsys.readouterr().err


def test_rows_with_a_truth_that_cannot_be_read_are_skipped_and_named_where_asked(demo, tmp_path, capsys):
    table = json.loads((demo / "test.json").read_text())[:3]
    file = tmp_path / "prompts.json"
    truths = [{"truth": truth} for truth in (1, "many", 2)]
    file.write_text(json.dumps([row | truth for row, truth in zip(table, truths, strict=True)]))
    more = [f"data.eval={{name: rollout, path: {file}, prompt: question}}", "data.on_bad_sample=skip"]
    mine = found(demo, demo / "model", tmp_path, *more, "--metric", "numeric", "generation.max_tokens=2")
    assert mine["rows"] == 2 and [row["truth"] for row in mine["answers"]] == [1, 2]
    assert f"skipped: {file}, row 1, key truth: reward numeric: " in capsys.readouterr().out


def test_boxes_come_with_the_share_of_one_half_or_more():
    rows = [{"box_iou": x, "exact": 1.0} for x in (0.5, 0.4, 1.0)]
    found = evaluate.means(["box_iou", "exact"], rows)
    assert found == {"box_iou": pytest.approx(1.9 / 3), "exact": 1.0, "acc@0.5": pytest.approx(2 / 3)}
