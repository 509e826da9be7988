"""What the vLLM engine does without vLLM: prompts, the check of what comes back, weights, what is refused."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastpo.config import Lora, Run
from fastpo.data import media
from fastpo.models import FAMILIES, trainable, vllm
from fastpo.sample import Encoded, Sampling
from tests import parity, tiny_families, tiny_qwen

SPECIALS = {258: "s", 259: "e", 260: "i", 261: "v"}


@pytest.mark.parametrize(
    ("family", "text", "want", "items"),
    [
        ("llava", "ttiiitt", "ttitt", 1),
        ("llava", "iitiiit", "itit", 2),
        ("llava_onevision", "tiivvvt", "tivt", 2),
        ("qwen2_vl", "tsiiietsvvet", "tsietsvet", 2),
        ("qwen3_vl", "tsiietstsvvettsvveet", "tsietsvet", 2),  # two pairs of frames with times, marks around all
        ("qwen3_vl", "tstsveetstsvetsveet", "tsvetsvet", 2),
        ("internvl", "tsiiiietsiiet", "titit", 2),
        ("internvl", "tset", "tset", 0),
        ("llava", "", "", 0),
    ],
)
def test_a_media_token_for_each_item_is_left(family, text, want, items):
    ids = {kind: token for token, kind in SPECIALS.items()} | {"t": 7}
    got, count = vllm.collapsed([ids[c] for c in text], SPECIALS, vllm.EXPANDED[family])
    assert ("".join(SPECIALS.get(token, "t") for token in got), count) == (want, items)


@pytest.mark.parametrize("kind", [*tiny_qwen.KINDS, "llava", "llava_onevision"])
def test_prompts_are_the_text_with_one_token_for_each_item(tmp_path, kind):
    """The ids that a tokenizer makes of the chat template's text, which vLLM would make of it."""
    if kind in tiny_qwen.KINDS:
        cfg = tiny_qwen.folder(tmp_path / "model", kind)
        marks = {"image": "<|vision_start|><|image_pad|><|vision_end|>"}
        marks["video"] = marks["image"].replace("image", "video")
    else:
        cfg = tiny_qwen.Model(path=str(tiny_families.write(tmp_path / "model", kind)), family=kind)  # pyright: ignore[reportArgumentType]
        marks = {"image": "<image>", "video": "<video>"}
    family, picture, clip = FAMILIES[kind], parity.image(tmp_path, 83, 41), parity.video(tmp_path, 64, 48)
    items = [picture, picture] if kind in ("llava", "qwen2_5_vl") else [picture, clip]
    question = "".join(f"<{item.kind}>\nand " for item in items) + "what?"
    p = family.processor(cfg)
    encoded = family.encode(p, parity.sample("rows.json:3", question, items, "A"), Sampling(frames=3))
    bare = family.encode(p, parity.sample("k", "QUESTION", [], "A"), Sampling(frames=3)).prompt
    text = p.chat.tokenizer.decode(bare)
    for item in items:
        question = question.replace(f"<{item.kind}>", marks[item.kind], 1) if kind in tiny_qwen.KINDS else question
    want = p.chat.tokenizer(text.replace("QUESTION", question), add_special_tokens=False).input_ids
    model_config = tiny_qwen.config(kind) if kind in tiny_qwen.KINDS else SimpleNamespace(
        model_type=kind, image_token_id=p.image_token_id, video_token_id=p.video_token_id
    )  # fmt: skip
    marked = vllm.classes(model_config, p)
    made = vllm.prompt(encoded, marked, kind, Sampling(frames=3))
    assert made["prompt_token_ids"] == want and len(want) < len(encoded.prompt)
    shown = made["multi_modal_data"]
    assert np.array_equal(np.asarray(shown["image"][0]), media.decode(picture, 1)[0])
    if clip in items:
        frames, facts = shown["video"][0]
        assert np.array_equal(frames, media.decode(clip, 3))
        assert (facts["total_num_frames"], facts["frames_indices"]) == media.frame_times(clip.path, 3)
    with pytest.raises(ValueError, match="rows.json:3: vLLM would find 2 images and videos in the prompt, .* has 1"):
        vllm.prompt(replace(encoded, media=encoded.media[:1]), marked, kind, Sampling(frames=3))


def test_positions_that_vllm_counts_otherwise_are_refused(tmp_path):
    marks = {260: "i", 261: "v"}
    clip = parity.video(tmp_path, 64, 48)
    encoded = Encoded(
        key="rows.json:3", prompt=torch.tensor([7, 261, 261, 261, 7, 7]), responses=(), weights=None, scores=(),
        positions=torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 4, 5], [0, 1, 2, 1, 4, 5]]), media=(clip,),
    )  # fmt: skip
    vllm.check_positions(encoded, marks, "qwen2_vl")
    assert encoded.positions is not None
    early = encoded.positions.clone()
    early[:, 4:] -= 1  # behind the larger side, which the times have passed
    for positions, family in ((early, "qwen2_vl"), (encoded.positions, "qwen2_5_vl")):
        with pytest.raises(ValueError, match="rows.json:3: vLLM counts the positions of this video otherwise"):
            vllm.check_positions(replace(encoded, positions=positions), marks, family)


def test_the_prompt_that_comes_back_must_be_the_policys():
    encoded = SimpleNamespace(key="rows.json:3", prompt=torch.tensor([5, 6, 6, 7]))
    said = SimpleNamespace(prompt_token_ids=[5, 6, 6, 7], outputs=[SimpleNamespace(token_ids=x) for x in ([1, 2], [3])])
    found = vllm.answers(encoded, said)  # pyright: ignore[reportArgumentType]
    assert [a.tolist() for a in found] == [[1, 2], [3]] and found[0].dtype == torch.int64
    for other, at in (([5, 6, 7], 2), ([5, 6, 6, 7, 7], 4), ([], 0)):
        said.prompt_token_ids = other
        with pytest.raises(ValueError, match=f"rows.json:3: vLLM reads {len(other)} tokens, .* from token {at}"):
            vllm.answers(encoded, said)  # pyright: ignore[reportArgumentType]


def test_weights_are_the_merged_ones_and_only_what_training_changes(tmp_path):
    cfg = tiny_qwen.folder(tmp_path, "qwen2_vl").model_copy(
        update={"lora": Lora(r=4, alpha=8), "train_projector": True, "gradient_checkpointing": False}
    )
    family = FAMILIES["qwen2_vl"]
    model = trainable.prepare(family.load(cfg), family.parts, cfg)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    entered: list[int] = []

    @contextmanager
    def gathered(parameters):
        entered.append(len(parameters))
        yield
        entered.append(0)

    found = {name: x.clone() for name, x in vllm.weights(model.get_base_model(), "qwen2_vl", gathered)}
    base = dict(family.load(cfg).named_parameters())
    merged = dict(model.merge_and_unload().named_parameters())
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    projector = {name for name in base if name.startswith(family.parts["projector"])}
    assert found.keys() == changed | projector and len(changed) == 3 * 7
    for name, x in found.items():
        torch.testing.assert_close(x, merged[name].data, rtol=0, atol=1e-7)
    assert entered[::2] == [3 if name in changed else 1 for name in found] and not any(entered[1::2])


def test_all_weights_are_given_without_adapters(tmp_path):
    cfg = tiny_qwen.folder(tmp_path, "qwen2_vl")
    model = FAMILIES["qwen2_vl"].load(cfg)
    found = dict(vllm.weights(model, "qwen2_vl", lambda _: contextmanager(lambda: iter([None]))()))
    assert found.keys() == dict(model.named_parameters()).keys()


def test_towers_of_llava_lie_deeper_in_vllm():
    inside, outside = "model.vision_tower.vision_model.encoder.x", "model.vision_tower.encoder.x"
    assert vllm.named(outside, "llava") == vllm.named(inside, "llava_next") == inside
    assert vllm.named(outside, "internvl") == outside
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert vllm.named(f"{name}.base_layer.bias", "llava") == f"{name}.bias"


def test_what_cannot_work_is_refused_before_anything_is_loaded(monkeypatch):
    def run(rollout=(), **model) -> Run:
        return Run.model_validate(
            {
                "out": "x",
                "model": {"path": "x", "family": "qwen2_vl"} | model,
                "data": {"train": {"name": "rollout", "path": "x"}},
                "batch": {"prompts": 1, "tokens": 64},
                "loss": {"name": "grpo"},
                "optim": {"lr": 1e-5},
                "rollout": {"engine": "vllm", "rewards": [{"name": "exact"}]} | dict(rollout),
            }
        )

    for family in ("mllama", "llava_video"):
        with pytest.raises(ValueError, match=f"rollout.engine: vllm is of families llava, .*, not {family}"):
            run(family=family)
    with pytest.raises(ValueError, match="rollout.engine: vllm reads pictures within the folder's limits"):
        run(max_pixels=10_000)
    with pytest.raises(ValueError, match="generation.temperature: 2.5, vllm takes at most 2"):
        run(rollout={"generation": {"temperature": 2.5}})
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="rollout.engine: vllm is not installed: pip install 'fastpo\\[vllm\\]'"):
        vllm.check(run())
