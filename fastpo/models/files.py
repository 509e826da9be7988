"""The small files of a Hugging Face model folder that travel with its weights."""

import json
import shutil
from pathlib import Path

VALUE_HEAD = "value_head.safetensors"  # of a critic or a reward model, beside the adapter or the model
PATTERNS = ("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.jinja", "*processor_config*")


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
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != model_type:
        raise ValueError(f"model.path: {folder} has model_type {kind!r}, expected {model_type!r}. {how_to}")
    missing = [name for name in ("tokenizer.json", "preprocessor_config.json") if not (folder / name).is_file()]
    missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors weights"]
    if missing:
        raise ValueError(f"model.path: {folder} lacks {', '.join(missing)}. {how_to}")
    return folder
