"""Checkpoints: a Hugging Face adapter or model, and what resuming needs, complete or not there at all.

out/checkpoints/step_000100/
    adapter/ or model/   loads with plain peft / transformers
    engine/              DeepSpeed's optimizer, scheduler and trained weights, one file per rank
    universal/           the same for any number of ranks, where another number has resumed from it
    state.json           step, number of ranks, the configuration that wrote it
"""

import json
import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from fastpo.config import Run
from fastpo.engine import Engine, universal
from fastpo.models.files import VALUE_HEAD, copy_side_files

HARMLESS = (
    "save_every",
    "log",
    "data.workers",
    "data.synthetic",
    "data.cache",
    "data.cache_gib",
    "out",
)  # keys that may differ on resume: no number depends on them


def save(engine: Engine, run: Run, step: int) -> Path:
    """Writes the checkpoint of `step` under a temporary name and renames it when every rank is done. Collective."""
    final = run.out / "checkpoints" / f"step_{step:06d}"
    if final.exists():
        return final
    partial = final.with_suffix(".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial, {"step": step})
    export(engine, run, partial)
    if dist.get_rank() == 0:
        state = {"step": step, "ranks": engine.ranks, "run": run.model_dump(mode="json")}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
    dist.barrier()
    if dist.get_rank() == 0:
        partial.rename(final)
    dist.barrier()
    return final


def latest(run: Run) -> Path | None:
    """The newest complete checkpoint of this run. Raises ValueError where `out` belongs to another configuration."""
    found = sorted(p for p in (run.out / "checkpoints").glob("step_*") if p.suffix != ".tmp")
    if not found:
        return None
    state = json.loads((found[-1] / "state.json").read_text())
    changed = _differences(state["run"], run.model_dump(mode="json"))
    if changed:
        raise ValueError(
            f"out: {run.out} holds checkpoints of another configuration (differs in {', '.join(changed)}); "
            "use another `out`"
        )
    return found[-1]


def of_other_ranks(folder: Path) -> bool:
    """Whether another number of ranks wrote it; then it is rewritten once for any number. Collective."""
    state = json.loads((folder / "state.json").read_text())
    if state["ranks"] == dist.get_world_size() or state["run"]["engine"]["zero"] == 0:  # without ZeRO each rank has all
        return False
    if dist.get_rank() == 0 and not (folder / "universal").exists():
        universal(folder)
    dist.barrier()
    return True


def load(engine: Engine, folder: Path) -> int:
    """Restores the engine and returns the number of optimizer steps done."""
    return int(engine.load(folder, "universal" if engine.universal else "engine")["step"])


def export(engine: Engine, run: Run, folder: Path) -> Path:
    """Writes folder/adapter (peft) or folder/model (transformers) with the tokenizer and image settings. Collective."""
    model = engine.policy.model
    is_adapter = hasattr(model, "peft_config")
    target = folder / ("adapter" if is_adapter else "model")
    state = _gather(engine, only_trained=is_adapter)
    head = engine.policy.value_head
    with engine.gathered([] if head is None else list(head.parameters())):
        values = {} if head is None else {k: v.detach().float().cpu().clone() for k, v in head.state_dict().items()}
    if dist.get_rank() != 0:
        return target
    if is_adapter:
        model.peft_config["default"].base_model_name_or_path = str(run.model.path)
        model.save_pretrained(target, state_dict=state)
        rest = {k: v for k, v in state.items() if "lora_" not in k}
        if rest:  # trained projector, vision tower or head beside the adapter
            save_file(
                {k.removeprefix("base_model.model."): v for k, v in rest.items()}, target / "trained_parts.safetensors"
            )
    else:
        if run.engine.zero == 3:
            # there transformers 5.23 records renamings of old checkpoints as well, by which the names that it writes
            # would have a "model." too many; without a record it writes those of every other stage
            model._weight_conversions = None
        model.save_pretrained(target, state_dict=state)
    if values:
        save_file(values, target / VALUE_HEAD)
    copy_side_files(Path(run.model.path), target)
    return target


def _gather(engine: Engine, *, only_trained: bool) -> dict[str, Tensor]:
    state = {}
    for name, parameter in engine.policy.model.named_parameters():
        if only_trained and not parameter.requires_grad:
            continue
        with engine.gathered([parameter]):
            if dist.get_rank() == 0:
                state[name] = parameter.detach().cpu().clone().contiguous()
    return state


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        path, a, b = prefix + key, old.get(key), new.get(key)
        if path in HARMLESS or a == b:
            continue
        found += _differences(a, b, path + ".") if isinstance(a, dict) and isinstance(b, dict) else [path]
    return found
