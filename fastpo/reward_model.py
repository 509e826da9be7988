"""A trained reward model (the losses reward_pair and reward_list) that scores sampled answers."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastpo.config import Run
from fastpo.models.files import VALUE_HEAD
from fastpo.models.policy import Policy
from fastpo.models.trained import open_model
from fastpo.rollout import Scorer
from fastpo.sample import MicroBatch


def load(run: Run, device: str) -> Scorer:
    """The scorer of rollout.reward_model: a run's folder, or a checkpoint's `adapter` or `model`, of the same family.

    An adapter is laid over model.path. The answers are scored as tokens, so both models need the same tokenizer. Raises
    ValueError for a folder without a value head.
    """
    folder = _folder(run)
    model, family, processor, chunk = open_model(run.model, folder, device)
    policy = Policy(model, family, processor, mode="none", stats=frozenset({"reward"}), frames_per_chunk=chunk)
    assert policy.value_head is not None
    policy.value_head.load_state_dict(load_file(folder / VALUE_HEAD))
    policy.value_head.to(device, dtype=getattr(torch, run.model.dtype))  # not all of policy: rotary tables stay fp32
    policy.requires_grad_(False).eval()

    def score(batch: MicroBatch) -> Tensor:
        found = policy(batch).reward
        if not found.isfinite().all():
            raise FloatingPointError(f"the reward model gives no finite number for {', '.join(batch.keys)}")
        return found

    return score


def head(run: Run) -> dict[str, Tensor]:
    """The weights of its value head alone, for a critic to start from. Raises ValueError as `load`."""
    return load_file(_folder(run) / VALUE_HEAD)


def _folder(run: Run) -> Path:
    assert run.rollout is not None and run.rollout.reward_model is not None
    folder = _newest(Path(run.rollout.reward_model))
    if not (folder / VALUE_HEAD).is_file():
        raise ValueError(f"rollout.reward_model: {folder} is no reward model (no {VALUE_HEAD})")
    return folder


def _newest(folder: Path) -> Path:
    """The exported folder of a run's newest checkpoint; any other folder is returned as it is."""
    heads = sorted(folder.glob(f"checkpoints/step_*/*/{VALUE_HEAD}"))
    return heads[-1].parent if heads else folder
