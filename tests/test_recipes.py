"""The recipes of configs/ in small: their own settings, rows of their own formats, runs from their command lines."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpo import demo
from fastpo.config import Model, Source, load
from fastpo.data import formats, recipes
from fastpo.data.synthetic import COLOURS
from fastpo.models import FAMILIES
from fastpo.sample import Sample, Sampling

# what a small run may say otherwise than its authors
SMALL = {
    "out", "model.path", "data.media_root", "data.train.path", "data.eval", "data.workers", "batch.prompts",
    "optim.lr", "optim.lr_value", "optim.steps", "rollout.generation.max_tokens",
    "rollout.gae.critic_steps", "rollout.reward_model", "warmup.steps",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("recipes") / "data"
    recipes.write(out, 0, train=2, test=1)
    return out


def test_every_file_of_configs_is_tried():
    assert set(demo.RECIPES) == {path.stem for path in demo.CONFIGS.glob("*.yaml")}


def flat(tree: dict, prefix: str = "") -> dict:
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


@pytest.mark.parametrize("name", demo.RECIPES)
def test_the_settings_are_the_recipes_own(name, tmp_path):
    *_, (module, (config, *overrides)) = demo.commands(name, tmp_path, steps=12)
    small, whole = (flat(load(config, given).model_dump(mode="json")) for given in (overrides, []))
    differ = {key for key in small | whole if small.get(key) != whole.get(key)}
    differ = {"data.eval" if key.startswith("data.eval.") else key for key in differ}
    assert module == "train" and {"out", "optim.steps"} <= differ and (differ <= SMALL or name == "demo"), (
        differ - SMALL
    )


@pytest.mark.parametrize("name", [name for name, recipe in demo.RECIPES.items() if recipe.data])
def test_its_format_reads_its_rows_and_its_family_encodes_them(made, name):
    recipe = demo.RECIPES[name]
    run = load(demo.CONFIGS / f"{name}.yaml")
    assert isinstance(run.data.train, Source)
    source = run.data.train.model_copy(update={"path": str(made / f"{recipe.data}_train.json")})
    found = formats.samples(source, made)
    assert len(found) == 8 and all(isinstance(sample, Sample) for sample in found), found
    folder = made / demo.RECIPES.get(recipe.model, recipe).model
    family = FAMILIES[run.model.family]
    processor = family.processor(Model(path=str(folder), family=run.model.family))
    encoded = family.encode(processor, found[0], Sampling(frames=run.data.frames))  # pyright: ignore
    assert encoded.patches > 0 and encoded.tokens < 1024, "the model's positions"


def overlap(a: list[int], b: list[int]) -> float:
    """IoU by counting pixels."""
    cover = np.zeros((2, 64, 64), bool)
    for layer, (x1, y1, x2, y2) in zip(cover, (a, b), strict=True):
        layer[y1:y2, x1:x2] = True
    return (cover[0] & cover[1]).sum() / (cover[0] | cover[1]).sum()


def test_boxes_are_those_of_the_shapes_and_scored_by_their_overlap(made):
    for row in json.loads((made / "boxes_train.json").read_text()):
        pixels = np.asarray(Image.open(made / row["image_path"])).astype(int)
        (colour,) = (rgb for name, rgb in COLOURS.items() if name in row["question"])
        y, x = np.nonzero(abs(pixels - colour).max(-1) < 40)
        best = json.loads(max(zip(row["iou_scores"], row["answers_gen"], strict=True))[1])
        assert np.abs(np.array(best) - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() <= 1
        assert len(set(row["answers_gen"])) == 20
        for text, score in zip(row["answers_gen"], row["iou_scores"], strict=True):
            assert score == pytest.approx(overlap(json.loads(text), best), abs=1e-4)


def test_a_recipe_runs_after_the_one_that_it_goes_on_from(tmp_path, capsys):
    demo.main(["--recipes", "ppo_llava15", "--quick", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "recipes.md").read_text()
    assert text in capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["rm_llava15", "ppo_llava15"]
    assert all(math.isfinite(float(number)) for row in rows for number in (*row[1:3], *row[4:]))
    assert "python -m fastpo.train " in text and f"rollout.reward_model={tmp_path}/out/rm_llava15" in text
