"""Tiny folders in LLaVA-NeXT's layout, named by a table of their own: into transformers' layout and back."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests import tiny_families

SIDE, PATCH, WIDTH = 20, 4, 48
QWEN: dict[str, Any] = dict(
    vocab_size=330, hidden_size=WIDTH, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, rope_theta=12345.0,
)  # fmt: skip
TOWER: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
)

# Written down from the original modules: LlavaMetaModel, SigLipVisionTower, build_vision_projector.
BLOCK = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
}  # fmt: skip


def original_name(name: str) -> str:
    """Of a parameter of transformers' module tree, word by word."""
    words = name.split(".")
    match words:
        case ["lm_head", *_]:
            return name
        case ["model", "image_newline"]:
            return name
        case ["model", "multi_modal_projector", linear, kind]:
            return f"model.mm_projector.{ {'linear_1': 0, 'linear_2': 2}[linear] }.{kind}"
        case ["model", "vision_tower", *rest]:
            return ".".join(["model", "vision_tower", "vision_tower", "vision_model", *rest])
        case ["model", "language_model", *rest]:
            assert rest[0] in ("embed_tokens", "norm") or ".".join(rest[2:-1]) in BLOCK
            return ".".join(["model", *rest])
    raise AssertionError(name)


def shaken(model: PreTrainedModel) -> Any:
    """Initial biases are 0 and norms 1: moved, or a lost one would pass."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def onevision(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=TOWER | dict(model_type="siglip_vision_model", vision_use_head=False),
        text_config=QWEN | dict(model_type="qwen2", tie_word_embeddings=tied), tie_word_embeddings=tied,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return shaken(LlavaOnevisionForConditionalGeneration(config))


def llava_15() -> Any:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=TOWER | dict(model_type="clip_vision_model", projection_dim=16),
        text_config=QWEN | dict(model_type="llama", vocab_size=VICUNA_WORDS), vision_feature_layer=-2,
    )  # fmt: skip
    return shaken(LlavaForConditionalGeneration(config))


SPECIALS = [t for t in tiny_families.SPECIALS if t not in ("<image>", "<video>")]
VICUNA_WORDS = 256 + len(SPECIALS)  # the tokenizer's own: no room for a placeholder


def tokenizer(folder: Path) -> None:
    """The bytes and the special tokens of tests.tiny_families, but without placeholders or a template."""
    full = tiny_families.tokenizer(starts=False, template="")
    stored = json.loads(full.backend_tokenizer.to_str())
    words = [t for t in stored["added_tokens"] if t["content"] in SPECIALS]
    stored["added_tokens"] = [t | {"id": 256 + n} for n, t in enumerate(words)]
    from tokenizers import Tokenizer

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)), eos_token="</s>", pad_token="<pad>"
    )
    made.save_pretrained(folder)


def write(
    folder: Path, model: Any, *, files: int = 3, pickled: bool = False, tower: bool = True, **config: Any
) -> Path:
    """An original folder of this model, in so many files."""
    folder.mkdir(parents=True)
    (folder.parent / "tower").mkdir(exist_ok=True)
    kind = model.config.vision_config.model_type.split("_")[0]
    sight = TOWER | (dict(num_hidden_layers=3) if kind == "siglip" else {})  # SigLIP's last layer is dropped
    (folder.parent / "tower" / "config.json").write_text(json.dumps(dict(model_type=kind, vision_config=sight)))
    weights = {original_name(k): v for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if not tower:
        weights = {k: v for k, v in weights.items() if "vision_tower" not in k}
    store(folder, weights, files=files, pickled=pickled)
    text = "Qwen" if kind == "siglip" else "Llama"
    settings = model.config.text_config.to_dict() | dict(
        architectures=[f"Llava{text}ForCausalLM"], model_type="llava", rope_theta=12345.0, torch_dtype="float32",
        mm_vision_tower="nobody/tiny", mm_projector_type="mlp2x_gelu", mm_hidden_size=32, mm_vision_select_layer=-2,
        mm_vision_select_feature="patch", mm_use_im_start_end=False, mm_newline_position="grid",
        tie_word_embeddings=model.config.tie_word_embeddings,
        image_aspect_ratio="anyres_max_9" if text == "Qwen" else "pad",
        mm_patch_merge_type="spatial_unpad" if text == "Qwen" else "flat", image_grid_pinpoints="(1x1),...,(3x2)",
    )  # fmt: skip
    del settings["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(settings | config))
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=258, temperature=0.9)))
    tokenizer(folder)
    return folder


def store(folder: Path, weights: dict[str, torch.Tensor], *, files: int, pickled: bool) -> None:
    keys = list(weights)
    names = [f"pytorch_model-{n}.bin" if pickled else f"model-{n}.safetensors" for n in range(files)]
    for n, name in enumerate(names):
        shard = {k: weights[k].contiguous() for k in keys[n::files]}
        torch.save(shard, folder / name) if pickled else save_file(shard, folder / name)
    index = {"weight_map": {k: names[n % files] for n, k in enumerate(keys)}}
    (folder / f"{'pytorch_model.bin' if pickled else 'model.safetensors'}.index.json").write_text(json.dumps(index))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, by key."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    for file in folder.glob("pytorch_model*.bin"):
        found |= torch.load(file, weights_only=True)
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def loaded(folder: Path) -> Any:
    """The model and what transformers says of its weights."""
    return AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)


def outputs(model: Any, ids: torch.Tensor, video: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = {} if video is None else {"pixel_values_videos": video}
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False, **pixels)
    return out.logits, out.hidden_states[-1]
