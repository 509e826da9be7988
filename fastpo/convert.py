"""`python -m fastpo.convert SOURCE OUT`: a LLaVA checkpoint from the original layout into transformers', or back.

LLaVA-NeXT-format folders (LLaVA-Video, LLaVA-OneVision: Qwen2 and SigLIP; LLaVA-1.5: Llama and CLIP) and peft adapters
trained on them. Weights keep their bits and their dtype. Placeholder tokens are added to the tokenizer where it lacks
them. The embeddings grow, to a multiple of 64 rows, only where the new ids do not fit: Qwen2's have room, so its logits
stay as they are (the llava-hf folders of these models have 64 rows more). New rows are the mean of the others, the
centre of the distribution that transformers draws them from. Going back cuts them off.
"""

import argparse
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AddedToken, AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig

from fastpo.models import layout
from fastpo.models.files import copy_side_files, read_json

RECORD = "llava_original"  # in the converted config.json: the original configuration and the tokens that were added
PEFT = "base_model.model."
SHOWN = 20  # names of each kind in an error


class Piece(NamedTuple):
    """Where a tensor lies."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Move(NamedTuple):
    """A tensor under its new name; rows: cut or grown to so many."""

    key: str
    piece: Piece
    rows: int | None = None

    @property
    def bytes(self) -> int:
        shape = self.piece.shape if self.rows is None else (self.rows, *self.piece.shape[1:])
        return torch.Size(shape).numel() * self.piece.dtype.itemsize


Read = Callable[[Iterable[Piece]], Iterator[Tensor]]


def convert(
    source: Path,
    out: Path,
    *,
    to: str = "hf",
    vision_tower: Path | None = None,
    like: Path | None = None,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes `out`, whole or not at all. A `source` with adapter_config.json is a peft adapter.

    vision_tower: the tower's own folder, for its weights where the checkpoint has none and its configuration where
    layout.TOWERS does not know it. like: an original folder whose config.json a folder gets that was not made here.
    Memory: one shard of at most shard_bytes, or the largest tensor. Raises ValueError for missing, unknown or wrongly
    shaped weights, all of them listed, before anything is written.
    """
    if to not in ("hf", "original"):
        raise ValueError(f"--to {to}: neither hf nor original")
    if out.exists():
        raise ValueError(f"{out} exists already")
    if (source / "adapter_config.json").is_file():
        write = _adapter(source, to)
    elif not (source / "config.json").is_file():
        raise ValueError(f"{source}: neither config.json nor adapter_config.json")
    elif to == "hf":
        write = _to_hf(source, vision_tower, shard_bytes)
    else:
        write = _to_original(source, like, shard_bytes)
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_hf(source: Path, vision_tower: Path | None, shard_bytes: int) -> Callable[[Path], None]:
    """Checks everything that can be checked without writing; the function it returns writes."""
    original = read_json(source / "config.json")
    if "mm_vision_tower" not in original:
        raise ValueError(f"{source}: no mm_vision_tower in config.json; it is not in the original layout")
    config: Any = layout.hf_config(original, source / "config.json", vision_tower)
    pieces = {key: piece for key, piece in listed(source).items() if not layout.DERIVED.search(key)}
    names = {key: layout.renamed(key, layout.ORIGINAL, layout.HF) for key in pieces}
    moves = [Move(name, pieces[key]) for key, name in names.items() if name]
    unknown = [key for key, name in names.items() if not name]
    shapes = _shapes(config)
    if vision_tower is not None and not any(move.key.startswith(layout.TOWER) for move in moves):
        stored = {layout.TOWER + key: piece for key, piece in listed(vision_tower).items()}
        moves += [Move(key, piece) for key, piece in stored.items() if key in shapes]  # SigLIP: not its last layer
    _check(source, moves, unknown, shapes, config, layout.ORIGINAL)

    def write(folder: Path) -> None:
        tokens = layout.PLACEHOLDERS[config.model_type]
        ids, added = _save_tokenizer(source, folder, tokens, layout.TEMPLATES[config.model_type])
        vocabulary = config.text_config.vocab_size
        rows = vocabulary if max(ids) < vocabulary else -(-(max(ids) + 1) // 64) * 64
        config.text_config.vocab_size = rows
        for token, number in zip(("image_token_id", "video_token_id"), ids, strict=False):
            setattr(config, token, number)
        setattr(config, RECORD, {"config": original, "added_tokens": added})
        config.save_pretrained(folder)
        settings = layout.image_settings(config, original)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
        _copy_token_ids(source, folder)
        save([m._replace(rows=rows) if m.key in layout.EMBEDDINGS else m for m in moves], folder, shard_bytes)

    return write


def _to_original(source: Path, like: Path | None, shard_bytes: int) -> Callable[[Path], None]:
    stored = read_json(source / "config.json")
    if stored.get("model_type") not in layout.PLACEHOLDERS or "mm_vision_tower" in stored:
        raise ValueError(f"{source}: not one of transformers' {', '.join(layout.PLACEHOLDERS)} folders")
    config: Any = AutoConfig.from_pretrained(source)
    record = stored.get(RECORD, {"added_tokens": []})
    if like is not None:
        record = {**record, "config": read_json(like / "config.json")}
    if "config" not in record:
        raise ValueError(f"{source}: was not converted here; name a folder with the original config.json with --like")
    pieces = {layout.spelled(key): piece for key, piece in listed(source).items()}
    names = {key: layout.renamed(key, layout.HF, layout.ORIGINAL) for key in pieces}
    unknown = [pieces[key].key for key, name in names.items() if not name]
    _check(
        source, [Move(key, pieces[key]) for key in pieces if names[key]], unknown, _shapes(config), config, layout.HF
    )
    rows = record["config"]["vocab_size"]
    moves = [Move(name, pieces[k], rows if k in layout.EMBEDDINGS else None) for k, name in names.items() if name]

    def write(folder: Path) -> None:
        copy_side_files(source, folder)
        tokenizer = read_json(folder / "tokenizer.json")
        kept = [token for token in tokenizer["added_tokens"] if token["content"] not in record["added_tokens"]]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": kept}, ensure_ascii=False))
        (folder / "config.json").write_text(json.dumps(record["config"], indent=2))
        _copy_token_ids(source, folder)
        save(moves, folder, shard_bytes)

    return write


def _adapter(source: Path, to: str) -> Callable[[Path], None]:
    """adapter_model.* and what was trained beside it: non_lora_trainables.bin there, trained_parts.safetensors here.

    target_modules become the full names of the adapted modules: a name such as q_proj would fit the tower's too.
    """
    config = read_json(source / "adapter_config.json")
    for key in ("modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ValueError(f"{source / 'adapter_config.json'}: {key} is set, which is not converted")
    columns = (layout.ORIGINAL, layout.MODULES) if to == "hf" else (layout.MODULES, layout.ORIGINAL)
    moves, unknown = [], []
    for key, piece in listed(source, "adapter_model").items():
        name = layout.renamed(key.removeprefix(PEFT), *columns) if key.startswith(PEFT) else None
        moves += [Move(PEFT + name, piece)] if name else []
        unknown += [] if name else [key]
    rest = []
    for file in ("non_lora_trainables.bin", "trained_parts.safetensors"):
        for key, piece in (_inside(source / file) if (source / file).is_file() else {}).items():
            name = layout.renamed(key.removeprefix(PEFT), *columns)
            rest += [Move(name, piece)] if name else []
            unknown += [] if name else [key]
    keys = {move.key for move in moves}
    modules = sorted({key.partition(".lora_")[0] for key in keys if ".lora_" in key})
    pairs = [f"{module}.lora_{x}.weight" for module in modules for x in "AB"]
    _refuse(source, {"missing": [key for key in pairs if key not in keys], "unknown": unknown})
    if not modules:
        raise ValueError(f"{source}: holds no LoRA weights")

    def write(folder: Path) -> None:
        names = [module.removeprefix(PEFT) for module in modules]
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": names}, indent=2))
        copy_side_files(source, folder)
        save(moves, folder, sum(move.bytes for move in moves), stem="adapter_model")
        if to == "hf" and rest:
            save(rest, folder, sum(move.bytes for move in rest), stem="trained_parts")
        elif to == "original":  # their loader opens it always
            parts = {PEFT + m.key: t for m, t in zip(rest, tensors(m.piece for m in rest), strict=True)}
            torch.save(parts, folder / "non_lora_trainables.bin")

    return write


def listed(folder: Path, stem: str | None = None) -> dict[str, Piece]:
    """All weights of a folder's safetensors or .bin files by name. Raises ValueError where a file is missing."""
    patterns = [f"{stem}.safetensors", f"{stem}.bin"] if stem else ["model*.safetensors", "pytorch_model*.bin"]
    files = next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        raise ValueError(f"{folder}: no {' or '.join(patterns)}")
    index = folder / (
        "model.safetensors.index.json" if files[0].suffix == ".safetensors" else "pytorch_model.bin.index.json"
    )
    if stem is None and index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index}: no weight_map")
        files = [folder / name for name in sorted(set(names.values()))]
    pieces: dict[str, Piece] = {}
    for file in files:
        found = _inside(file)
        twice = pieces.keys() & found.keys()
        if twice:
            raise ValueError(f"{file}: holds weights that an earlier file has too: {', '.join(sorted(twice)[:SHOWN])}")
        pieces |= found
    return pieces


def _inside(file: Path) -> dict[str, Piece]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
                facts = {key: (tuple(s.get_shape()), _DTYPES.get(s.get_dtype())) for key, s in slices.items()}
        else:
            stored: Any = _unpickled(file)
            facts = {key: (tuple(t.shape), t.dtype) for key, t in stored.items()}
    except Exception as error:  # torch.load and safetensors let through whatever a broken file leads to
        raise ValueError(f"{file}: cannot be read as weights: {type(error).__name__} {error}") from error
    return {key: Piece(file, key, shape, _floating(file, key, dtype)) for key, (shape, dtype) in facts.items()}


def _floating(file: Path, key: str, dtype: torch.dtype | None) -> torch.dtype:
    """Quantised weights come with scales that transformers' modules do not have."""
    if dtype is None or dtype not in _DTYPES.values():
        raise ValueError(f"{file}: {key} is quantised, only weights of {', '.join(_DTYPES)} are converted")
    return dtype


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def _unpickled(file: Path) -> Mapping[str, Tensor]:
    """Of a .bin file; mapped into memory, not read, but for files from before PyTorch 1.6."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def tensors(pieces: Iterable[Piece]) -> Iterator[Tensor]:
    """Reads one tensor after the other, each file once as long as its pieces come together."""
    for file, group in groupby(pieces, key=lambda piece: piece.file):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for piece in group:
                    yield opened.get_tensor(piece.key)
        else:
            stored = _unpickled(file)
            for piece in group:
                yield stored[piece.key].clone(memory_format=torch.contiguous_format)  # of its own: tied ones share


def save(moves: list[Move], folder: Path, limit: int, read: Read = tensors, stem: str = "model") -> None:
    """Writes safetensors shards of at most `limit` bytes (a larger tensor: alone), and their index where it is several.

    Holds one shard in memory.
    """
    shards: list[list[Move]] = []
    filled = limit
    for move in moves:
        if not shards or filled + move.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(move)
        filled += move.bytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        read_in = zip(shard, read(move.piece for move in shard), strict=True)
        held = {move.key: tensor if move.rows is None else _fitted(tensor, move.rows) for move, tensor in read_in}
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
        del held, read_in
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(move.bytes for move in moves)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _fitted(x: Tensor, rows: int) -> Tensor:
    """[V, H] -> [rows, H], cut off or filled up with the mean row."""
    if rows <= len(x):
        return x[:rows].contiguous() if rows < len(x) else x
    return torch.cat([x, x.mean(0, dtype=torch.float32).to(x.dtype).expand(rows - len(x), -1)])


def _shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """What the model of this configuration consists of, as transformers builds it."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return {layout.spelled(key): tuple(x.shape) for key, x in model.state_dict().items()}


def _check(
    source: Path,
    moves: list[Move],
    unknown: list[str],
    shapes: dict[str, tuple[int, ...]],
    config: Any,
    column: int,
) -> None:
    """Raises ValueError that lists what is missing, unknown or of another shape, in the source's names."""
    found = {move.key: move.piece for move in moves}
    optional = {layout.EMBEDDINGS[1]} if config.tie_word_embeddings else set()
    missing = [layout.renamed(key, layout.HF, column) or key for key in shapes if key not in found.keys() | optional]
    unknown = unknown + [piece.key for key, piece in found.items() if key not in shapes]
    other = [f"{p.key} {p.shape} for {shapes[k]}" for k, p in found.items() if k in shapes and p.shape != shapes[k]]
    where = "; a vision tower that lies elsewhere is named with --vision-tower"
    no_tower = column == layout.ORIGINAL and not any(key.startswith(layout.TOWER) for key in found)
    _refuse(source, {"missing": missing, "unknown": unknown, "of another shape": other}, where if no_tower else "")


def _refuse(source: Path, problems: dict[str, list[str]], hint: str = "") -> None:
    lines = [
        f"{len(names)} weights {kind}: {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(f"{source}: {'; '.join(lines)}{hint}")


def _save_tokenizer(source: Path, folder: Path, tokens: tuple[str, ...], template: str) -> tuple[list[int], list[str]]:
    """The source's tokenizer with these tokens and template. Returns their ids and which of them are new."""
    if not (source / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise ValueError(f"{source}: has no tokenizer.json; to read a tokenizer.model, pip install 'fastpo[convert]'")
    with tempfile.TemporaryDirectory() as aside:  # without config.json, whose model_type transformers would misread
        copy_side_files(source, Path(aside))
        try:
            tokenizer = AutoTokenizer.from_pretrained(aside)
        except Exception as error:  # tokenizers and sentencepiece let through whatever a broken file leads to
            raise ValueError(f"{source}: its tokenizer cannot be read: {error}") from error
    added = [token for token in tokens if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return [tokenizer.get_vocab()[token] for token in tokens], added


def _copy_token_ids(source: Path, folder: Path) -> None:
    """The token ids of generation_config.json; its sampling values may be ones that save_pretrained refuses."""
    file = source / "generation_config.json"
    if file.is_file():
        kept = {key: value for key, value in read_json(file).items() if key.endswith("_token_id")}
        (folder / file.name).write_text(json.dumps(kept, indent=2))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.convert", description=__doc__)
    parser.add_argument("source", type=Path, help="model folder, or a peft adapter's")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--to", choices=("hf", "original"), default="hf", help="layout to write (default: hf)")
    parser.add_argument("--vision-tower", type=Path, help="the vision tower's own folder, where it is not in SOURCE")
    parser.add_argument("--like", type=Path, help="with --to original: a folder with the original config.json")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file to write, in GiB (default: 5)")
    args = parser.parse_args(argv)
    options = dict(to=args.to, vision_tower=args.vision_tower, like=args.like)
    try:
        convert(args.source, args.out, **options, shard_bytes=int(args.shard_gb * 2**30))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"converted weights in {args.out}")


if __name__ == "__main__":
    main()
