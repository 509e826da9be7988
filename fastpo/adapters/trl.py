"""The trainers of TRL 1.16 on fused losses: `fuse(DPOTrainer(...)).train()`.

Needs trl, which fastpo itself does not. Replaced are the policy's head and the loss (DPO: the reference's head too),
inside of the model's own forward, so that wrappers (DDP, PEFT, autocast) see one call. Data, rollouts, rewards and the
optimizer stay TRL's.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import use_adapter

from fastpo_kernels import fused_dpo, fused_grpo, fused_logp

Trainer = TypeVar("Trainer", bound=DPOTrainer | GRPOTrainer)
LOGIT_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
MEDIA = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def fuse(trainer: Trainer) -> Trainer:
    """Makes a DPOTrainer or GRPOTrainer, before it trains, compute its loss by fused_dpo or fused_grpo; returns it.

    DPO: loss_type "sigmoid". GRPO: loss_type "grpo", "dapo" or "dr_grpo" per token, "grpo" per sequence (GSPO), with
    any epsilon, beta and temperature. Logged beside TRL's own numbers: rewards/* (a margin of 0 is half right) or kl
    and clip_ratio/*_mean (means of the ranks' means). entropy and logits/* are not: nothing computes them.

    Heads must be whole when they are called: one device, DDP, ZeRO-1 or 2. Raises TypeError for another trainer, and
    ValueError for options and models of which the loss would be another.
    """
    if isinstance(trainer, DPOTrainer):
        compute_loss, problems = _dpo, _dpo_problems(trainer)
    elif isinstance(trainer, GRPOTrainer):
        compute_loss, problems = _grpo, _grpo_problems(trainer)
    else:
        raise TypeError(f"fuse takes a DPOTrainer or a GRPOTrainer, got {type(trainer).__name__}")
    bare: list[Any] = [trainer.accelerator.unwrap_model(m) for m in (trainer.model, trainer.ref_model) if m is not None]
    models: list[Any] = [m.get_base_model() if isinstance(m, PeftModel) else m for m in bare]
    config = models[0].config.get_text_config()
    problems += [name for name in LOGIT_SCALES if getattr(config, name, None)]
    if problems:
        raise ValueError(f"the fused {type(trainer).__name__} loss does not have: {', '.join(problems)}")
    for model in models:
        _add_fused_forward(model)
    trainer.compute_loss = MethodType(compute_loss, trainer)
    return trainer


def _dpo_problems(trainer: Any) -> list[str]:
    wrong = {
        f"loss_type {trainer.loss_types}": trainer.loss_types != ["sigmoid"],
        f"f_divergence_type {trainer.f_divergence_type!r}": trainer.f_divergence_type != "reverse_kl",
        "ld_alpha": trainer.ld_alpha is not None,
        "use_weighting": trainer.use_weighting,
        "a router loss": trainer.aux_loss_enabled,
    }
    return [name for name, is_wrong in wrong.items() if is_wrong]


def _grpo_problems(trainer: Any) -> list[str]:
    level, args = trainer.importance_sampling_level, trainer.args
    kinds = {("grpo", "token"), ("dapo", "token"), ("dr_grpo", "token"), ("grpo", "sequence")}
    wrong = {
        f"loss_type {trainer.loss_type!r} per {level}": (trainer.loss_type, level) not in kinds,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "top_entropy_quantile": trainer.top_entropy_quantile < 1,
        "an entropy bonus": trainer._entropy_bonus_enabled,
        "delta": args.delta is not None,
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32,
        "vllm_importance_sampling_correction": trainer.use_vllm and trainer.vllm_importance_sampling_correction,
        "a router loss": trainer.aux_loss_enabled,
    }
    return [name for name, is_wrong in wrong.items() if is_wrong]


def _add_fused_forward(model: Any) -> None:
    """model(..., fused=f) returns f(hidden, weight, bias=..., softcap=...), in the dtype that the head would run in."""
    original = model.forward
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @functools.wraps(original)  # generate() reads the signature
    def forward(*args: Any, fused: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if fused is None:
            return original(*args, **kwargs)
        hidden = model.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        head, device = model.get_output_embeddings(), hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        return fused(hidden.to(dtype), head.weight.to(dtype), bias=bias, softcap=softcap)

    model.forward = forward


def _dpo(trainer: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Tensor:
    """DPOTrainer.compute_loss."""
    _no_outputs(return_outputs)
    own = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    forward = {name: value for name, value in inputs.items() if name not in own}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    if trainer.precompute_ref_logps:
        ref_logp = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    else:
        ref_logp = _reference(trainer, forward, labels)
    loss, metrics = model(
        **forward, fused=functools.partial(fused_dpo, labels=labels, ref_logp=ref_logp, beta=trainer.beta)
    )
    names = {"chosen_reward": "chosen", "rejected_reward": "rejected", "accuracy": "accuracies", "margin": "margins"}
    _log(trainer, {f"rewards/{name}": metrics[key] for key, name in names.items()})
    return loss * trainer.loss_weights[0]


@torch.no_grad()
def _reference(trainer: Any, forward: dict[str, Any], labels: Tensor) -> Tensor:
    """[2B, T - 1] log-probabilities; without a model of its own the reference is the policy without its adapter."""
    model, adapter = trainer.ref_model, nullcontext()
    if model is None:
        model, policy = trainer.model, trainer.accelerator.unwrap_model(trainer.model)
        adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
    with adapter, trainer.accelerator.autocast():
        return model(**forward, fused=functools.partial(fused_logp, labels=labels))


def _grpo(trainer: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Tensor:
    """GRPOTrainer.compute_loss."""
    _no_outputs(return_outputs)
    prompt, completion, mask = inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"]
    forward = {name: inputs[name] for name in MEDIA if inputs.get(name) is not None}
    forward["input_ids"] = torch.cat([prompt, completion], 1)
    forward["attention_mask"] = torch.cat([inputs["prompt_mask"], mask], 1)
    mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
    labels = torch.cat([torch.full_like(prompt, -100), completion.masked_fill(mask == 0, -100)], 1)
    old_logp, ref_logp = inputs.get("old_per_token_logps"), inputs["ref_per_token_logps"] if trainer.beta else None
    before = (prompt.shape[1] - 1, 0)  # they score completions, we whole rows
    fused = functools.partial(
        fused_grpo,
        labels=labels,
        advantages=inputs["advantages"],
        old_logp=None if old_logp is None else F.pad(old_logp, before),
        ref_logp=None if ref_logp is None else F.pad(ref_logp, before),
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        beta=trainer.beta,
        kl_ratio=trainer.args.use_bias_correction_kl,
        loss_type="gspo" if trainer.importance_sampling_level == "sequence" else trainer.loss_type,
        max_completion_length=trainer.max_completion_length,
        temperature=trainer.temperature,
    )
    loss, metrics = model(**forward, fused=fused)
    names = {"kl": "kl", "clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}
    _log(trainer, {name: metrics[key] for key, name in names.items() if key in metrics})
    return loss * _share(trainer, mask, inputs)


def _share(trainer: Any, mask: Tensor, inputs: dict[str, Any]) -> Tensor | float:
    """What the mean over a micro-batch counts in its window: TRL 1.16 grpo_trainer.py:3150-3176."""
    window = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
    if trainer.loss_type != "dapo":
        return 1 / window
    tokens = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    batches = trainer.args.steps_per_generation if trainer.model.training else 1  # tokens are those of so many batches
    return mask.sum() / (tokens * window / batches)


def _log(trainer: Any, values: dict[str, Tensor]) -> None:
    """Means over ranks, in one gather, to where TRL's `log` looks for them."""
    means = trainer.accelerator.gather(torch.stack(list(values.values()))[None]).mean(0).tolist()
    mode = "train" if trainer.model.training else "eval"
    for name, mean in zip(values, means, strict=True):
        trainer._metrics[mode][name].append(mean)


def _no_outputs(return_outputs: bool) -> None:
    if return_outputs:
        raise ValueError("the fused loss makes no logits to return: leave compute_metrics out")
