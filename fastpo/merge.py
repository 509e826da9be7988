"""`python -m fastpo.merge ADAPTER OUT`: the base model with an adapter merged in, as a plain Hugging Face folder."""

import argparse
import json
import shutil
from pathlib import Path


def merge(adapter: Path, out: Path, base: Path | None = None) -> None:
    """adapter: a peft folder (or a checkpoint that holds adapter/). base: overrides the path stored in the adapter.

    Raises ValueError where a folder is missing or `out` exists.
    """
    adapter = adapter / "adapter" if (adapter / "adapter").is_dir() else adapter
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter}: no adapter_config.json; a full fine-tuning checkpoint needs no merging")
    base = base or Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    if not (base / "config.json").is_file():
        raise ValueError(f"{base}: the base model is not there; name it with --base")
    if out.exists():
        raise ValueError(f"{out} exists already")

    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    from fastpo.models.files import copy_side_files

    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    rest = adapter / "trained_parts.safetensors"
    if rest.exists():
        unexpected = merged.load_state_dict(load_file(rest), strict=False).unexpected_keys
        assert not unexpected, unexpected
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    copy_side_files(base, partial)
    partial.rename(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.merge", description=__doc__)
    parser.add_argument("adapter", type=Path, help="adapter folder, or a checkpoint folder that holds one")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--base", type=Path, help="base model folder, where it has moved since training")
    args = parser.parse_args(argv)
    try:
        merge(args.adapter, args.out, args.base)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"merged weights in {args.out}")


if __name__ == "__main__":
    main()
