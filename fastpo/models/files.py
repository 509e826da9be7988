"""The small files of a Hugging Face model folder that travel with its weights."""

import shutil
from pathlib import Path

PATTERNS = ("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.jinja", "*processor_config*")


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and image settings."""
    for pattern in PATTERNS:
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)
