"""A model as a run left it: the base model with an adapter and what was trained beside it, or a whole model."""

from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from fastpo.config import Model
from fastpo.models import FAMILIES, Family


class Opened(NamedTuple):
    """model: in eval mode and without gradients, in peft's wrapper where there is an adapter. chunk: pictures in one
    call of its vision tower, None: all."""

    model: Any
    family: Family
    processor: Any
    chunk: int | None = None

    @property
    def core(self) -> Any:
        """The Hugging Face model, adapters acting, without peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model


def weights(folder: Path) -> Path:
    """Where the weights of a checkpoint lie: its adapter/ or model/, or the folder itself.

    Raises ValueError where there is neither an adapter nor a model.
    """
    for place in (folder / "adapter", folder / "model", folder):
        if any((place / name).is_file() for name in ("adapter_config.json", "config.json")):
            return place
    raise ValueError(f"{folder}: neither a checkpoint, nor an adapter's or a model's folder")


def open_model(cfg: Model, adapter: Path | None = None, device: str = "cpu") -> Opened:
    """The model of cfg.path with the adapter laid over it; an `adapter` that is a whole model takes its place.

    adapter: a checkpoint, or its adapter/ (with trained_parts.safetensors, where other parts were trained) or model/.
    Raises ValueError for a folder that holds none of these.
    """
    folder = None if adapter is None else weights(adapter)
    whole = folder is not None and not (folder / "adapter_config.json").is_file()
    if whole:
        cfg = cfg.model_copy(update={"path": str(folder)})
    family = FAMILIES[cfg.family]
    model = family.load(cfg)
    if folder is not None and not whole:
        from peft import PeftModel

        # adapters in the model's dtype, as they were trained
        model = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
        rest = folder / "trained_parts.safetensors"
        if rest.is_file():
            unexpected = model.get_base_model().load_state_dict(load_file(rest), strict=False).unexpected_keys
            if unexpected:
                raise ValueError(f"{rest}: {cfg.path} has no {unexpected[0]}")
    return Opened(model.to(device).requires_grad_(False).eval(), family, family.processor(cfg), cfg.frames_per_chunk)
