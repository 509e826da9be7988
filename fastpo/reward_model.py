"""A trained reward model (the loss `reward`) that scores sampled answers."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastpo.config import Run
from fastpo.models import FAMILIES
from fastpo.models.files import VALUE_HEAD
from fastpo.models.policy import Policy
from fastpo.rollout import Scorer
from fastpo.sample import MicroBatch


def load(run: Run, device: str) -> Scorer:
    """The scorer of rollout.reward_model: a run's folder, or a checkpoint's `adapter` or `model`, of the same family.

    An adapter is laid over model.path. The answers are scored as tokens, so both models need the same tokenizer. Raises
    ValueError for a folder without a value head.
    """
    assert run.rollout is not None and run.rollout.reward_model is not None
    folder = _newest(Path(run.rollout.reward_model))
    if not (folder / VALUE_HEAD).is_file():
        raise ValueError(f"rollout.reward_model: {folder} is no reward model (no {VALUE_HEAD})")
    family = FAMILIES[run.model.family]
    is_adapter = (folder / "adapter_config.json").is_file()
    model = family.load(run.model if is_adapter else run.model.model_copy(update={"path": str(folder)}))
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    policy = Policy(model, family, family.processor(run.model), mode="none", stats=frozenset({"reward"}))
    assert policy.value_head is not None
    policy.value_head.load_state_dict(load_file(folder / VALUE_HEAD))
    policy.to(device, dtype=getattr(torch, run.model.dtype)).requires_grad_(False).eval()

    def score(batch: MicroBatch) -> Tensor:
        found = policy(batch).reward
        if not found.isfinite().all():
            raise FloatingPointError(f"the reward model gives no finite number for {', '.join(batch.keys)}")
        return found

    return score


def _newest(folder: Path) -> Path:
    """The exported folder of a run's newest checkpoint; any other folder is returned as it is."""
    heads = sorted(folder.glob(f"checkpoints/step_*/*/{VALUE_HEAD}"))
    return heads[-1].parent if heads else folder
