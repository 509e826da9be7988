"""`python -m fastpo.mine`: the one layer's attention against transformers' eager one, and the rows that stay."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from fastpo import answers, mine
from fastpo.config import Model, Source
from fastpo.data import formats, mia
from fastpo.models import images
from fastpo.models.trained import open_model
from fastpo.sample import Media, Sample, Sampling
from tests import tiny_families, tiny_qwen

CONFIG = """
out: {out}
model: {{path: {model}, family: llava, dtype: float32}}
data: {{train: {{name: mia, path: unused.json}}, workers: 0}}
batch: {{prompts: 1, tokens: 4096}}
loss: {{name: dpo}}
optim: {{lr: 1e-3}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures with questions, the rows of several images that fastpo.data.mia makes of them, and a model."""
    out = tmp_path_factory.mktemp("mine")
    draw = np.random.default_rng(0)
    rows = []
    for n in range(6):
        Image.fromarray(draw.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(out / f"{n}.png")
        said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Noise {n}."}]
        rows.append({"image": f"{n}.png", "conversations": said})
    (out / "rows.json").write_text(json.dumps(rows))
    mia.main([str(out / "rows.json"), "--media-root", str(out), "--out", str(out / "made")])
    tiny_families.write(out / "llava", "llava")
    (out / "run.yaml").write_text(CONFIG.format(out=out / "run", model=out / "llava"))
    return out


def told(opened, sample):
    sampling = Sampling(frames=1)
    prompt = opened.family.encode(opened.processor, sample, sampling)
    return mine.replace(prompt, pixels=opened.family.pixels(opened.processor, sample, sampling))


def two_images(folder):
    media = tuple(Media(kind="image", path=folder / f"{n}.png") for n in range(2))
    return Sample(key="x:0", question="Image1:<image>\nImage2:<image>\nIn Image2, what?", media=media, responses=())


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layers_attention_and_the_logits_are_those_of_the_plain_model(folder, layer):
    opened = open_model(Model(path=str(folder / "llava"), family="llava", dtype="float32"))
    prompt, answer = told(opened, two_images(folder)), torch.tensor([70, 80, 90, 75, 2])
    attention, logits = mine.attention_and_logits(opened, prompt, answer, layer)
    plain = AutoModelForImageTextToText.from_pretrained(folder / "llava", attn_implementation="eager").eval()
    p = opened.processor.images
    with torch.no_grad():
        out = plain(
            torch.cat([prompt.prompt, answer])[None], output_attentions=True,
            pixel_values=images.normalized(prompt.pixels, p.mean, p.std),
        )  # fmt: skip
    first = len(prompt.prompt)
    expected = out.attentions[layer][0, :, first : first + 4].transpose(0, 1)
    torch.testing.assert_close(attention, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, out.logits[0, first - 1 : first + 4], rtol=1e-4, atol=1e-5)
    tokens = [opened.processor.image_token_id]
    at = (prompt.prompt == tokens[0]).nonzero()[:, 0]
    seen = expected.double().mean((0, 1))
    shares = [float(seen[at[:n]].mean()) for n in (len(at) // 2,)] + [float(seen[at[len(at) // 2 :]].mean())]
    row = {"kind": "sequence", "count": 2, "target": 2}
    ratio = mine.ratio(row, "llava", opened.processor, prompt, tokens, attention)
    assert ratio == pytest.approx(shares[1] / sum(shares), abs=1e-5)
    assert opened.model.model.language_model.layers[layer].self_attn.config._attn_implementation != "fastpo_watched"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
def test_a_collages_map_is_one_view_of_the_whole_picture(folder, tmp_path, family):
    """Attention on a single place of the picture falls into the block where that place is."""
    if family == "llava_next":
        cfg = Model(path=str(tiny_families.write(tmp_path / family, family)), family=family, dtype="float32")
    else:
        cfg = tiny_qwen.folder(tmp_path / family, family)
    opened = open_model(cfg)
    Image.new("RGB", (120, 80)).save(tmp_path / "wide.png")
    media = (Media(kind="image", path=tmp_path / "wide.png"),)
    prompt = told(opened, Sample(key="x:0", question="<image>\nWhat?", media=media, responses=()))
    tokens = answers_tokens(opened)
    (run,) = mine.runs(prompt.prompt, tokens)
    high, wide = (5, 5) if family == "llava_next" else (int(prompt.grid[0, 1]) // 2, int(prompt.grid[0, 2]) // 2)
    assert len(run) >= high * wide and (family == "llava_next") == (len(run) > high * wide)
    attention = torch.zeros(3, 2, len(prompt.prompt) + 4)
    attention[..., run.start + (high - 1) * wide] = 0.25  # bottom left
    row = {"kind": "grid", "count": 4}
    found = [mine.ratio(row | {"target": n}, family, opened.processor, prompt, tokens, attention) for n in range(1, 5)]
    assert found == [0, 0, 1, 0]
    pip = {"kind": "pip", "count": 2, "target": 2}
    assert mine.ratio(pip, family, opened.processor, prompt, tokens, attention) == (0 if high >= 6 else 1)
    assert math.isnan(mine.ratio(pip, family, opened.processor, prompt, tokens, attention[:0]))


def answers_tokens(opened):
    return mine.media_tokens(opened.core.config)


def test_rows_that_stay_have_the_models_own_answer_and_the_format_reads_them(folder, tmp_path, capsys):
    out = tmp_path / "mined.json"
    mine.main([str(folder / "run.yaml"), str(folder / "made/mia.json"), "--out", str(out), "--layer", "1",
               "generation.max_tokens=8"])  # fmt: skip
    kept, made = json.loads(out.read_text()), json.loads((folder / "made/mia.json").read_text())
    assert f"{len(kept)} of {len(made)} rows" in capsys.readouterr().out and 0 < len(kept) < len(made)
    assert {row["kind"] for row in kept} >= {"sequence", "grid"}
    opened = open_model(Model(path=str(folder / "llava"), family="llava", dtype="float32"))
    row = next(row for row in kept if row["kind"] == "sequence")
    media = tuple(Media(kind="image", path=folder / path) for path in row["image"])
    prompt = told(opened, Sample(key="x:0", question=row["prompt"], media=media, responses=()))
    greedy = answers.Generation(max_tokens=8, temperature=0)
    assert row["rejected"] == answers.texts(opened, prompt, greedy, count=1, seed=4)[0]
    for sample in formats.samples(Source(name="mia", path=str(out)), folder):
        assert isinstance(sample, Sample) and len(sample.responses) == 2


def test_what_cannot_be_mined_is_refused(folder, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": "a", "image": ["0.png"], "prompt": "?"}]))
    made = folder / "made/mia.json"
    edited = json.loads(made.read_text())
    for key, value in (("kind", "collage"), ("count", 12), ("target", 0)):
        path = tmp_path / f"{key}.json"
        path.write_text(json.dumps([edited[0], edited[1] | {key: value}]))
    for arguments, message in (
        ([made, "--layer", "2"], "--layer: 2, the language model has layers 0 to 1"),
        ([rows], "rows.json, row 0, key chosen: missing"),
        ([tmp_path / "kind.json"], "row 1, key kind: expected one of sequence, grid, pip, got 'collage'"),
        ([tmp_path / "count.json"], "row 1, key count: expected one of 2, 3, 4, 5, got 12"),
        ([tmp_path / "target.json"], "row 1, key target: expected one of 1, 2"),
        ([made, "model.family=llava_video"], "model_type 'llava'"),
    ):
        with pytest.raises(SystemExit):
            mine.main([str(folder / "run.yaml"), *map(str, arguments), "--out", str(tmp_path / "x.json")])
        assert message in capsys.readouterr().err
