"""What the configuration accepts, and the key that it names when it does not."""

from pathlib import Path

import pytest
import transformers
import yaml
from torch import nn, optim

from fastpo.config import Optim, Source, load, schedule_factor, warmup_run

ROOT = Path(__file__).parents[1]
SMALLEST = {
    "out": "runs/x",
    "model": {"path": "tiny"},
    "data": {"train": {"name": "rrpo", "path": "train.json"}},
    "batch": {"prompts": 2, "tokens": 64},
    "loss": {"name": "dpo"},
    "optim": {"lr": 1e-5},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def refusal(file, *overrides) -> str:
    with pytest.raises(ValueError) as error:
        load(file, overrides)
    assert type(error.value) is ValueError
    return str(error.value)


def test_only_six_sections_have_no_default(file):
    run = load(file)
    assert isinstance(run.data.train, Source)
    assert (run.out, run.model.path, run.data.train.path) == (Path("runs/x"), "tiny", "train.json")
    assert run.reference.mode == "adapter_off" and run.engine.zero == 3 and run.optim.clip == 1.0
    file.write_text("")
    missing = [text.strip() for text in refusal(file).splitlines()[1:]]
    assert missing == [f"{key}: Field required" for key in SMALLEST]


@pytest.mark.parametrize(
    "override, says",
    [
        ("modle.path=x", "modle: unknown key"),
        ("optim.lrr=1", "optim.lrr: unknown key"),
        ("data.train=null", "data.train: "),
        ("data.train.path=", "data.train.path: Input should be a valid string (got None)"),
        ("optim.lr=x", "optim.lr: Input should be a valid number"),
        ("optim.lr=0", "optim.lr: Input should be greater than 0 (got 0)"),
        ("optim.lr=.nan", "optim.lr: Input should be a finite number"),
        ("optim.lr=true", "optim.lr: does not take true"),
        ("optim.weight_decay=.inf", "optim.weight_decay: Input should be a finite number"),
        ("optim.betas=[0.9]", "optim.betas.1: Field required"),
        ("batch.tokens=64.5", "batch.tokens: Input should be a valid integer"),
        ("batch.prompts=0", "batch.prompts: Input should be greater than or equal to 1 (got 0)"),
        ("engine.zero=4", "engine.zero: Input should be less than or equal to 3 (got 4)"),
        ("reference.mode=frozen", "reference.mode: Input should be 'adapter_off', 'copy', 'cache' or 'none'"),
        ("model.dtype=fp8", "model.dtype: "),
        ("optim=3", "optim: Input should be a valid dictionary"),
        ("loss=dpo", "loss: Input should be a valid dictionary"),
        ("warmup.steps=3", "warmup.lr: Field required"),
        ("model.lora=null", "reference.mode: adapter_off needs model.lora"),
        (
            "model.train_vision=true",
            "reference.mode: adapter_off would let the reference drift with model.train_vision",
        ),
        ("model.train_language=false", "model.lora adapts the language model, but model.train_language is false"),
    ],
)
def test_bad_values_are_refused_with_their_path(file, override, says):
    lines = refusal(file, override).splitlines()
    assert lines[0] == f"{file}: bad configuration"
    assert any(text.startswith("  " + says) for text in lines[1:]), lines


def test_every_bad_key_is_named_at_once(file):
    said = refusal(file, "optim.lrr=1", "seed=x", "batch.tokens=1")
    assert all(key in said for key in ("optim.lrr: ", "seed: ", "batch.tokens: "))


def test_options_of_another_family_are_refused(file):
    assert load(file, ["model.time_instruction=true"]).model.time_instruction
    said = refusal(file, "model.time_instruction=true", "model.family=llava")
    assert "model.time_instruction is of family llava_video, not llava" in said


def test_a_run_that_trains_nothing_is_refused(file):
    said = refusal(file, "model.lora=null", "model.train_language=false", "reference.mode=none")
    assert "every train_* key is false" in said


@pytest.mark.parametrize(
    "text, says",
    [
        (b"optim: [", "not valid YAML"),
        (b"optim: \x00", "not valid YAML"),
        (b"\xff\xfe\xfa", "not valid YAML"),
        (b"- 1", "the top level must be a mapping of keys"),
    ],
)
def test_files_that_are_no_configuration(file, text, says):
    file.write_bytes(text)
    assert refusal(file).startswith(f"{file}: {says}")


def test_missing_file(tmp_path):
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such configuration file"
    assert "no such configuration file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "override, says",
    [
        ("optim.lr", "expected key.path=value"),
        ("=1", "expected key.path=value"),
        ("", "expected key.path=value"),
        ("out.x=1", "out is not a section"),
        ("optim.lr.x=1", "lr is not a section"),
        ("optim.lr=[1", "not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_read(file, override, says):
    assert refusal(file, override).startswith(f"override {override!r}: {says}")


def test_overrides_are_yaml_and_the_last_wins(file):
    run = load(file, ["optim.lr=5e-7", "optim.betas=[0.8, 0.9]", "seed=1", "seed=2", "optim.steps=", "out=a=b"])
    assert (run.optim.lr, run.optim.betas, run.seed, run.optim.steps) == (5e-7, (0.8, 0.9), 2, None)
    assert run.out == Path("a=b")


def test_overrides_make_the_sections_they_need(file):
    run = load(file, ["data.eval.name=rrpo", "data.eval.path=test.json", "model.lora=null", "model.lora.r=4"])
    assert isinstance(run.data.eval, Source) and run.data.eval.path == "test.json"
    assert run.model.lora is not None and run.model.lora.r == 4


def test_data_sets_are_one_or_several(file):
    one = "{name: rrpo, path: '{out}/a.json', weight: 0.5, rule: 'first:3', split: x}"
    run = load(file, [f"data.train=[{one}, {{name: dpo, path: b.json}}]"])
    assert not isinstance(run.data.train, Source)
    a, b = run.data.train
    assert (a.path, a.weight, a.rule, a.options) == ("runs/x/a.json", 0.5, "first:3", {"split": "x"})
    assert (b.name, b.weight, b.rule, b.options) == ("dpo", 1.0, "all", {})
    assert "data.train.1.path: Field required" in refusal(file, f"data.train=[{one}, {{name: dpo}}]")
    assert "data.train.weight: Input should be greater than or equal to 0" in refusal(file, "data.train.weight=-1")
    assert "data.train: Tuple should have at least 1 item" in refusal(file, "data.train=[]")


def test_out_is_filled_in(file):
    run = load(file, ["data.train.path='{out}/data/train.json'", "data.synthetic='{out}/data'", "out=/tmp/y"])
    assert isinstance(run.data.train, Source)
    assert (run.data.train.path, run.data.synthetic) == ("/tmp/y/data/train.json", Path("/tmp/y/data"))


def test_warm_up_stage_trains_everything_without_a_reference(file):
    run = load(file, ["warmup={steps: 3, lr: 1e-3, prompts: 4}", "seed=5", "loss.beta=1", "optim.lr_vision=1"])
    stage = warmup_run(run)
    assert (stage.out, stage.seed, stage.warmup, stage.reference.mode) == (Path("runs/x/warmup"), 5, None, "none")
    assert (stage.optim.lr, stage.optim.steps, stage.optim.lr_vision, stage.batch.prompts) == (1e-3, 3, None, 4)
    assert (
        stage.model.lora is None and stage.model.train_vision and stage.model.train_projector and stage.model.train_head
    )
    assert (stage.data.train, stage.loss.name, stage.loss.options) == (run.data.train, "sft", {})


def test_plugins_keep_their_own_keys_for_later(file):
    run = load(file, ["loss.betta=1", "data.train.split=a"])
    assert isinstance(run.data.train, Source)
    assert run.loss.options == {"betta": 1} and run.data.train.options == {"split": "a"}


def test_values_cannot_change_after_loading(file):
    with pytest.raises(ValueError, match="frozen"):
        load(file).seed = 1


def test_shipped_configurations_load():
    for path in sorted(ROOT.glob("configs/*.yaml")):
        run = load(path)
        assert run.out and run.loss.name, path


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total, warmup", [(37, 0.03), (37, 0.0), (10, 0.33), (3, 1.0), (1, 0.03)])
def test_schedule_is_that_of_transformers(schedule, total, warmup):
    options = {"num_warmup_steps": -int(-warmup * total // 1)}
    if schedule != "constant":
        options["num_training_steps"] = total
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    theirs = make(optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), **options).lr_lambdas[0]
    ours = Optim(lr=1.0, schedule=schedule, warmup=warmup)
    assert [schedule_factor(ours, step, total) for step in range(total)] == pytest.approx(
        [theirs(step) for step in range(total)], rel=1e-12, abs=1e-15
    )
