"""Which parameters are trained, with which learning rate: freezing per part, LoRA, liger kernels for the body."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastpo.config import Lora, Model, Optim

logger = logging.getLogger(__name__)

# liger-kernel 0.8's function for each type of language model; all take the same switches
LIGER = {
    "llama": "apply_liger_kernel_to_llama",
    "mistral": "apply_liger_kernel_to_mistral",
    "qwen2": "apply_liger_kernel_to_qwen2",
    "qwen3": "apply_liger_kernel_to_qwen3",
}


def prepare(model: Any, parts: Mapping[str, tuple[str, ...]], cfg: Model) -> Any:
    """Freezes the parts as cfg says, adds adapters, turns gradient checkpointing on. Returns the (peft) model."""
    wanted = {part: getattr(cfg, f"train_{part}") for part in parts}
    if cfg.lora is not None:
        wanted["language"] = False  # only its adapters
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[part_of(name, parts)])
    if cfg.gradient_checkpointing:
        enable_checkpointing(model)
    return model if cfg.lora is None else _add_adapters(model, parts, cfg.lora)


def enable_checkpointing(model: Any) -> None:
    """Recomputes each decoder layer in backward. Non-reentrant, so that frozen inputs need no gradient."""
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def part_of(name: str, parts: Mapping[str, tuple[str, ...]]) -> str:
    """The part a parameter belongs to; adapter and wrapper prefixes are ignored. A tied head counts as language."""
    name = name.removeprefix("base_model.model.")
    found = [part for part, paths in parts.items() if any(name == p or name.startswith(p + ".") for p in paths)]
    assert len(found) == 1, f"parameter {name} belongs to {found}"
    return found[0]


def groups(model: nn.Module, parts: Mapping[str, tuple[str, ...]], optim: Optim) -> list[dict]:
    """Optimizer parameter groups, one per part that is trained, each with its own learning rate."""
    rates = {"vision": optim.lr_vision, "projector": optim.lr_projector}
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(part_of(name, parts), []).append(parameter)
    return [{"params": p, "lr": rates.get(part) or optim.lr, "name": part} for part, p in found.items()]


def apply_liger(language_model: Any, cfg: Model, device: str) -> None:
    """liger-kernel's norms, rotary and MLP in the language body on CUDA.

    Raises ValueError where cfg.liger is on and there is no CUDA device, or liger has nothing for this kind of body.
    """
    if cfg.liger == "off" or (cfg.liger == "auto" and device == "cpu"):
        return
    if device == "cpu":
        raise ValueError("model.liger: on needs a CUDA device")
    kind = language_model.config.model_type
    if kind not in LIGER:
        if cfg.liger == "on":
            raise ValueError(f"model.liger: on, but there are no kernels for {kind}, only for {', '.join(LIGER)}")
        logger.warning("model.liger: auto: no kernels for a %s language model, it runs without them", kind)
        return
    from liger_kernel import transformers as liger

    getattr(liger, LIGER[kind])(
        rope=True,
        swiglu=True,
        rms_norm=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=language_model,
    )


def _add_adapters(model: Any, parts: Mapping[str, tuple[str, ...]], lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if lora.target == "language":
        target = [n for n in linear if n.startswith(parts["language"])]
    else:
        target = [n for n in linear if re.fullmatch(lora.target, n)]
    if not target:
        raise ValueError(f"model.lora.target: {lora.target!r} matches no Linear module")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target, bias="none")
    # adapters in the model's dtype: ZeRO-3 cannot gather mixed dtypes together; the optimizer keeps fp32 masters
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():  # peft freezes every base weight, also parts that are trained
        if name in trained:
            parameter.requires_grad_(True)
    return peft_model


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; sharded ones are counted whole."""
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    return sum(n for trained, n in sizes if trained), sum(n for _, n in sizes)
