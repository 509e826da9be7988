"""Hugging Face model folders: what is in them, their small files, and the model itself."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, PreTrainedModel

from fastpo.config import Model
from fastpo.models import attention

VALUE_HEAD = "value_head.safetensors"  # of a critic or a reward model, beside the adapter or the model
PATTERNS = ("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.jinja", "*processor_config*")

# Where transformers before 5 wrote what is now a part of processor_config.json; videos without a file: as images.
SETTINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "image_processor": ("preprocessor_config.json",),
        "video_processor": ("video_preprocessor_config.json", "preprocessor_config.json"),
    }
)


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError naming the file for one that is not there or holds no JSON object."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected keys and values, got a {type(tree).__name__}")
    return tree


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and image settings."""
    for pattern in PATTERNS:
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)


def checked(path: str, model_type: str, how_to: str) -> Path:
    """The folder, if it holds a model of this type. Raises ValueError that says what is wrong and ends with how_to."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path: {folder} is not a model folder (no config.json). {how_to}")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != model_type:
        raise ValueError(f"model.path: {folder} has model_type {kind!r}, expected {model_type!r}. {how_to}")
    there = {
        "tokenizer.json": (folder / "tokenizer.json").is_file(),
        "preprocessor_config.json": bool(settings(folder, "image_processor")[1]),
        "*.safetensors weights": any(folder.glob("*.safetensors")),
    }
    missing = [name for name, found in there.items() if not found]
    if missing:
        raise ValueError(f"model.path: {folder} lacks {', '.join(missing)}. {how_to}")
    return folder


def how_to(repository: str) -> str:
    """What to do about a missing folder; repository: of a checkpoint in transformers' layout."""
    return (
        f"Download a checkpoint in transformers' layout, for example with `hf download {repository} --local-dir "
        f"weights/{repository.rpartition('/')[2]}`, and point model.path at that folder."
    )


def loaded(cfg: Model, model_type: str, how_to: str, text_attention: str | None = None) -> PreTrainedModel:
    """The model of a folder of this type in cfg.dtype, with tree attention, or the one named, in its language part.

    Raises ValueError where weights are missing or of another kind.
    """
    folder = checked(cfg.path, model_type, how_to)
    names = {"text_config": text_attention or attention.register(cfg.attention), "vision_config": "sdpa"}
    try:
        found: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, cfg.dtype), attn_implementation=names, output_loading_info=True
        )
    except (SafetensorError, RuntimeError) as error:  # a cut file; weights of other shapes
        raise ValueError(f"model.path: {folder}: its weights cannot be loaded: {error}") from error
    made, info = found
    if missing := sorted(info["missing_keys"]):  # transformers would start them at random and only warn
        shown = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        raise ValueError(f"model.path: {folder} lacks {len(missing)} weights: {shown}")
    return made


def settings(folder: Path, part: str) -> tuple[Path, dict[str, Any]]:
    """The file with the settings of "image_processor" or "video_processor", and these; empty where there are none.

    Looked for as transformers 5.23 does, image_processing_base.py and video_processing_utils.py:
    processor_config.json wins where it holds them.
    """
    whole = folder / "processor_config.json"
    if whole.is_file() and (found := read_json(whole).get(part)):
        return whole, found
    files = [folder / name for name in SETTINGS[part]]
    file = next((file for file in files if file.is_file()), files[-1])
    return file, read_json(file) if file.is_file() else {}
