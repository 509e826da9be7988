"""`python -m fastpo.convert` on tiny folders in the layout of LLaVA's authors, there and back."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from fastpo import convert
from fastpo.config import Model
from fastpo.models import chat, layout, llava, llava_onevision, llava_video
from fastpo.sample import Response, Sample
from tests.original_layout import (
    BLOCK,
    SIDE,
    TOWER,
    VICUNA_WORDS,
    WIDTH,
    equal,
    llava_15,
    loaded,
    onevision,
    original_name,
    outputs,
    shaken,
    stored,
    write,
)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_onevision_there_and_back(tmp_path, tied, pickled):
    plain = onevision(tied=tied)
    source = write(tmp_path / "original", plain, pickled=pickled)
    convert.convert(source, tmp_path / "hf", vision_tower=tmp_path / "tower", shard_bytes=60_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3

    made, report = loaded(tmp_path / "hf")
    assert type(made) is LlavaOnevisionForConditionalGeneration
    assert not any(report.values())
    assert made.dtype == torch.float32 and made.config.text_config.rope_parameters["rope_theta"] == 12345.0
    assert equal(made.state_dict(), plain.state_dict())

    plain.config.video_token_id = made.config.video_token_id
    ids = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    ids[0, 5 : 5 + 2 * 9 + 1] = made.config.video_token_id  # two frames of 3 x 3 pooled patches, one newline
    video = torch.randn(1, 2, 3, SIDE, SIDE)
    for a, b in zip(outputs(made, ids, video), outputs(plain, ids, video), strict=True):
        assert torch.equal(a, b)

    made.save_pretrained(tmp_path / "trained")  # a training run's export: transformers' own spelling of the names
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "trained" / file).write_bytes((tmp_path / "hf" / file).read_bytes())
    for name in ("hf", "trained"):
        convert.convert(tmp_path / name, tmp_path / f"{name} back", to="original")
        assert equal(stored(tmp_path / f"{name} back"), stored(source))
        for file in ("config.json", "tokenizer.json"):
            assert json.loads((tmp_path / f"{name} back" / file).read_text()) == json.loads((source / file).read_text())


def test_llava_15_with_its_tower_elsewhere(tmp_path):
    plain = llava_15()
    source = write(tmp_path / "original", plain, tower=False, pickled=True)
    clip = {k.removeprefix("model.vision_tower.vision_tower."): v for k, v in named(plain, "vision_tower").items()}
    extra = {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(())}
    save_file(clip | extra, tmp_path / "tower" / "model.safetensors")
    with pytest.raises(ValueError, match=r"39 weights missing: model.vision_tower.*--vision-tower"):
        (tmp_path / "nothing").mkdir()
        (tmp_path / "nothing" / "config.json").write_bytes((tmp_path / "tower" / "config.json").read_bytes())
        save_file(extra, tmp_path / "nothing" / "model.safetensors")
        convert.convert(source, tmp_path / "hf", vision_tower=tmp_path / "nothing")
    convert.convert(source, tmp_path / "hf", vision_tower=tmp_path / "tower")

    made, report = loaded(tmp_path / "hf")
    assert type(made) is LlavaForConditionalGeneration
    assert not any(report.values())
    assert made.config.image_token_id == VICUNA_WORDS  # first beyond the tokenizer
    rows = made.get_input_embeddings().weight
    assert rows.shape == (320, WIDTH) and made.config.text_config.vocab_size == 320  # 262 rounded up to 64s
    for new, old in ((rows, plain.get_input_embeddings().weight), (made.lm_head.weight, plain.lm_head.weight)):
        assert torch.equal(new[:VICUNA_WORDS], old)
        assert torch.allclose(
            new[VICUNA_WORDS:], old.double().mean(0).float().expand(320 - VICUNA_WORDS, -1), atol=1e-7
        )
    ids = torch.randint(0, VICUNA_WORDS, (1, 9))
    a, b = outputs(made, ids, None), outputs(plain, ids, None)
    assert torch.equal(a[1], b[1]) and torch.equal(a[0][..., :VICUNA_WORDS], b[0])

    convert.convert(tmp_path / "hf", tmp_path / "back", to="original")
    assert equal(stored(tmp_path / "back"), {original_name(k): v for k, v in plain.state_dict().items()})
    assert json.loads((tmp_path / "back" / "tokenizer.json").read_text()) == json.loads(
        (source / "tokenizer.json").read_text()
    )


def named(model: Any, part: str) -> dict[str, torch.Tensor]:
    return {original_name(k): v.contiguous() for k, v in model.state_dict().items() if part in k}


def test_siglip_elsewhere_loses_its_last_layer_and_head(tmp_path):
    torch.manual_seed(1)
    larger: dict[str, Any] = TOWER | dict(num_hidden_layers=3)
    whole = shaken(SiglipVisionModel(SiglipVisionConfig(**larger)))
    source = write(tmp_path / "original", onevision(), tower=False)
    whole.save_pretrained(tmp_path / "siglip")  # no vision_model. in its names under transformers 5
    weights = load_file(tmp_path / "siglip" / "model.safetensors")
    prefixed = {"vision_model." + k.removeprefix("vision_model."): v for k, v in weights.items()}
    save_file(prefixed, tmp_path / "tower" / "model.safetensors")
    convert.convert(source, tmp_path / "hf", vision_tower=tmp_path / "tower")
    tower = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").model.vision_tower
    assert len(tower.encoder.layers) == 2 and any("head" in k for k in prefixed)
    kept = tower.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in whole.state_dict().items() if k in kept)


def test_the_families_read_a_converted_folder(tmp_path):
    convert.convert(write(tmp_path / "a", onevision()), tmp_path / "qwen", vision_tower=tmp_path / "tower")
    convert.convert(write(tmp_path / "b", llava_15()), tmp_path / "llama", vision_tower=tmp_path / "tower")
    ask = Sample(key="", question="Why?", media=(), responses=(Response(text="So.", score=0.0),))

    video = llava_video.processor(Model(path=str(tmp_path / "qwen")))
    assert (video.size, video.mean, video.video_token) == (SIDE, (0.5, 0.5, 0.5), "<video>")
    text = str(video.chat.tokenizer.decode(chat.prompt_ids(video.chat, ask.question)))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    images = llava_onevision.processor(Model(path=str(tmp_path / "qwen")))
    tiles = [(h * SIDE, w * SIDE) for w in (1, 2, 3) for h in (1, 2)]  # "(1x1),...,(3x2)": width x height
    assert images.limit == 9 and list(images.images.pinpoints) == tiles

    old = llava.processor(Model(path=str(tmp_path / "llama")))
    assert old.images.pad and old.images.side == old.images.shortest == SIDE
    text = str(old.chat.tokenizer.decode(chat.prompt_ids(old.chat, ask.question)))
    assert text.startswith("A chat between a curious user and an art") and text.endswith(
        "user's questions. USER: Why? ASSISTANT:"
    )
    assert old.chat.end == "</s>"
    typed = [{"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image"}]}]
    assert "USER: <image>\nWhy? " in str(old.chat.tokenizer.apply_chat_template(typed, tokenize=False))


@pytest.mark.parametrize("name", layout.TOWERS)
def test_published_towers(name):
    config = layout.TOWERS[name]
    defaults = {"siglip": LlavaOnevisionConfig(), "clip": LlavaConfig()}[name.split("-")[0]].vision_config
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "hidden_act"):
        assert getattr(config, key) == getattr(defaults, key), key
    dropped = isinstance(config, SiglipVisionConfig)  # transformers' default is the tower as LLaVA uses it
    assert config.num_hidden_layers - dropped == defaults.num_hidden_layers
    assert dropped or isinstance(config, CLIPVisionConfig)


def test_missing_unknown_and_misshapen_weights_are_listed(tmp_path):
    source = write(tmp_path / "original", onevision(), files=2)
    file = source / "model-1.safetensors"
    weights = load_file(file)
    norm = next(k for k in weights if k.endswith("input_layernorm.weight"))
    lost = next(k for k in weights if k.endswith("q_proj.weight"))
    weights["model.faster_token"] = torch.zeros(3)
    weights["model.layers.3.mlp.up_proj.weight"] = weights.pop(lost)
    weights[norm] = torch.ones(WIDTH + 1)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)  # a buffer of old: dropped
    save_file(weights, file)
    with pytest.raises(ValueError) as error:
        convert.convert(source, tmp_path / "hf", vision_tower=tmp_path / "tower")
    said = str(error.value)
    assert f"1 weights missing: {lost};" in said
    assert "2 weights unknown: model.faster_token, model.layers.3.mlp.up_proj.weight;" in said
    assert f"1 weights of another shape: {norm} ({WIDTH + 1},) for ({WIDTH},)" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "tower"]


CONFIG = {
    "another tower": (dict(mm_vision_tower="nobody/eva"), "mm_vision_tower nobody/eva is not known here"),
    "a resampler's projector": (dict(mm_projector_type="pooler"), "mm_projector_type is 'pooler', only 'mlp2x_gelu'"),
    "no tiles": (dict(image_aspect_ratio="pad"), "image_aspect_ratio is 'pad'"),
    "marked images": (dict(mm_use_im_start_end=True), "mm_use_im_start_end is True"),
    "another model": (dict(architectures=["LlavaMptForCausalLM"]), r"architectures \['LlavaMptForCausalLM'\]"),
    "a mixed model": (dict(architectures=["LlavaLlamaForCausalLM"]), "llama with a siglip_vision_model"),
}


@pytest.mark.parametrize("case", CONFIG)
def test_what_transformers_cannot_do_is_refused(tmp_path, case):
    changes, message = CONFIG[case]
    source = write(tmp_path / "original", onevision(), files=1, **changes)
    with pytest.raises(ValueError, match=message):
        convert.convert(source, tmp_path / "hf", vision_tower=None if "tower" in case else tmp_path / "tower")


def test_wrong_folders_are_refused_and_a_failure_leaves_nothing(tmp_path, capsys):
    source = write(tmp_path / "original", onevision(), files=2)
    out = tmp_path / "hf"
    with pytest.raises(ValueError, match="not one of transformers'"):
        convert.convert(source, out, to="original")
    with pytest.raises(ValueError, match="neither config.json nor"):
        convert.convert(tmp_path, out)
    (source / "model-1.safetensors").write_bytes((source / "model-1.safetensors").read_bytes()[:-5])
    with pytest.raises(ValueError, match="model-1.safetensors: cannot be read"):
        convert.convert(source, out, vision_tower=tmp_path / "tower")
    source = write(tmp_path / "second", onevision(), files=2)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="second: has no tokenizer.json|second: its tokenizer cannot be read"):
        convert.convert(source, out, vision_tower=tmp_path / "tower")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "second", "tower"]
    with pytest.raises(SystemExit) as left:
        convert.main([str(source), str(source)])
    assert left.value.code == 2 and "exists already" in capsys.readouterr().err


def test_names_of_a_model_saved_after_zero3(tmp_path):
    source = write(tmp_path / "original", onevision(), files=1)
    convert.convert(source, tmp_path / "hf", vision_tower=tmp_path / "tower")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    longer = {k.replace("language_model.model.", "language_model.model.model."): v for k, v in load_file(file).items()}
    assert longer.keys() != load_file(file).keys()
    save_file(longer, file)
    convert.convert(tmp_path / "hf", tmp_path / "back", to="original")
    assert equal(stored(tmp_path / "back"), stored(source))


def nested(file: Path) -> None:
    torch.save({"state_dict": torch.load(file, weights_only=True)}, file)


def quantised(file: Path) -> None:
    save_file(load_file(file) | {"model.layers.0.mlp.up_proj.weight.absmax": torch.zeros(3, dtype=torch.uint8)}, file)


BROKEN = {
    "text for pickled weights": ("pytorch_model-0.bin", lambda f: f.write_bytes(b"hello" * 20)),
    "no bytes": ("pytorch_model-0.bin", lambda f: f.write_bytes(b"")),
    "weights one level down": ("pytorch_model-0.bin", nested),
    "a lost shard": ("pytorch_model-0.bin", Path.unlink),
    "quantised weights": ("model-0.safetensors", quantised),
    "an index of nothing": ("model.safetensors.index.json", lambda f: f.write_text("{}")),
    "an index that is cut": ("model.safetensors.index.json", lambda f: f.write_text("{")),
    "a configuration that is cut": ("config.json", lambda f: f.write_text('{"mm_vision_tower":')),
    "a list of resolutions that is none": (
        "config.json",
        lambda f: f.write_text(f.read_text().replace("(1x1),...,(3x2)", "all")),
    ),
    "a tokenizer that is cut": ("tokenizer.json", lambda f: f.write_text("{")),
    "a tower without a configuration": ("../tower/config.json", Path.unlink),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path, case):
    name, damage = BROKEN[case]
    source = write(tmp_path / "original", onevision(), pickled=name.endswith(".bin"))
    damage(source / name)
    wanted = "original: its tokenizer" if "tokenizer" in case else Path(name).name
    with pytest.raises(ValueError, match=wanted):
        convert.convert(source, tmp_path / "hf", vision_tower=tmp_path / "tower")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "tower"]


def test_a_folder_from_elsewhere_takes_the_original_configuration_of_another(tmp_path):
    source = write(tmp_path / "original", onevision())
    convert.main([str(source), str(tmp_path / "hf"), "--vision-tower", str(tmp_path / "tower")])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config[convert.RECORD]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--like"):
        convert.convert(tmp_path / "hf", tmp_path / "back", to="original")
    convert.convert(tmp_path / "hf", tmp_path / "back", to="original", like=source)
    assert equal(stored(tmp_path / "back"), stored(source))


def test_memory_is_bounded_by_a_shard(tmp_path):
    """Bytes of the tensors alive at any time, counted as the writer takes them."""
    sizes = [3000, 1000, 9000, 2000, 2000, 4000, 500, 3500, 1000, 7000]
    for half in (0, 1):
        shard = {f"{n}": torch.full((size // 4,), float(n)) for n, size in enumerate(sizes) if n % 2 == half}
        save_file(shard, tmp_path / f"model-{half}.safetensors")
    alive, peak = 0, 0

    def died(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(pieces):
        nonlocal alive, peak
        for tensor in convert.tensors(pieces):
            weakref.finalize(tensor, died, tensor.nbytes)
            alive += tensor.nbytes
            peak = max(peak, alive)
            yield tensor
            del tensor

    (tmp_path / "out").mkdir()
    moves = [convert.Move("new." + key, piece) for key, piece in sorted(convert.listed(tmp_path).items())]
    convert.save(moves, tmp_path / "out", 6000, counted)
    assert alive == 0 and peak == 9000  # the largest tensor, alone in its shard
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    held = [load_file(file) for file in files]
    assert [sum(x.nbytes for x in h.values()) for h in held] == [4000, 9000, 4000, 4500, 4500, 7000]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {k: f.name for f, h in zip(files, held, strict=True) for k in h}
    assert all(torch.equal(x, torch.full_like(x, float(k[-1]))) for h in held for k, x in h.items())
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def adapter(folder: Path, *, targets: Any) -> dict[str, torch.Tensor]:
    """A LoRA adapter as published: every Linear of the language model, saved from the original module tree."""
    folder.mkdir()
    plain, weights, rank = onevision(), {}, 3
    generator = torch.Generator().manual_seed(2)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and "language_model" in name:
            key = "base_model.model." + original_name(name + ".weight").removesuffix(".weight")
            weights[f"{key}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            weights[f"{key}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator)
    torch.save(weights, folder / "adapter_model.bin")
    config = dict(
        base_model_name_or_path="lmms-lab/LLaVA-Video-7B-Qwen2", bias="none", fan_in_fan_out=False, inference_mode=True,
        init_lora_weights=True, lora_alpha=6, lora_dropout=0.05, modules_to_save=None, peft_type="LORA", r=rank,
        target_modules=targets, task_type="CAUSAL_LM", layers_to_transform=None,
    )  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return weights


LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("exact", [True, False])  # RRPO names every module in full, PerPO its leaf
def test_a_published_adapter_loads_on_the_converted_model(tmp_path, exact):
    full = [f"model.layers.{n}.{m}" for n in range(3) for m in BLOCK if "layernorm" not in m]
    weights = adapter(tmp_path / "lora", targets=full if exact else LEAVES)
    torch.save({}, tmp_path / "lora" / "non_lora_trainables.bin")
    convert.convert(tmp_path / "lora", tmp_path / "hf")
    assert not (tmp_path / "hf" / "trained_parts.safetensors").exists()

    plain, adapted = onevision(), PeftModel.from_pretrained(onevision(), str(tmp_path / "hf"))
    merged: Any = adapted.merge_and_unload()
    changed = 0
    for (name, before), after in zip(plain.state_dict().items(), merged.state_dict().values(), strict=True):
        key = f"base_model.model.{original_name(name).removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in weights:
            a, b = (weights[f"{key}.lora_{x}.weight"].double() for x in "AB")
            wanted, changed = before.double() + 6 / 3 * b @ a, changed + 1
            assert torch.allclose(after.double(), wanted, rtol=0, atol=1e-5)
        else:
            assert torch.equal(after, before)
    assert changed == 3 * 7

    convert.convert(tmp_path / "hf", tmp_path / "back", to="original")
    assert equal(load_file(tmp_path / "back" / "adapter_model.safetensors"), weights)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(full)
    assert torch.load(tmp_path / "back" / "non_lora_trainables.bin", weights_only=True) == {}


def test_what_was_trained_beside_an_adapter_and_what_is_wrong_in_one(tmp_path):
    weights = adapter(tmp_path / "lora", targets=LEAVES)
    parts = {f"base_model.model.{k}": v for k, v in named(onevision(), "projector").items()}
    torch.save(parts, tmp_path / "lora" / "non_lora_trainables.bin")
    convert.convert(tmp_path / "lora", tmp_path / "hf")
    trained = load_file(tmp_path / "hf" / "trained_parts.safetensors")  # what fastpo.merge loads into the model
    assert not onevision().load_state_dict(trained, strict=False).unexpected_keys and len(trained) == 4
    convert.convert(tmp_path / "hf", tmp_path / "back", to="original")
    assert equal(torch.load(tmp_path / "back" / "non_lora_trainables.bin", weights_only=True), parts)

    with pytest.raises(ValueError, match="46 weights unknown: base_model.model.model.language_model.layers"):
        convert.convert(tmp_path / "hf", tmp_path / "twice")
    lost = next(iter(weights))
    torch.save({k: v for k, v in weights.items() if k != lost}, tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(ValueError, match="1 weights missing: "):
        convert.convert(tmp_path / "lora", tmp_path / "twice")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text()) | dict(rank_pattern={"q_proj": 8})
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rank_pattern is set"):
        convert.convert(tmp_path / "lora", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
