"""DeepSpeed behind a few verbs: the only file that imports it.

Facts it rests on (DeepSpeed 0.19.8): the gradient is averaged over ranks, so the loss is multiplied by their number; it
is clipped at 1.0 where `gradient_clipping` is absent, so the key is always written; dataclasses hide tensors from
the hooks of ZeRO-3, tuples do not.
"""

import os
import shutil
import socket
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch._dynamo  # noqa: F401  (before zero.Init, which patches Tensor.__new__ in a way its first import rejects)
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fastpo.config import Run, schedule_factor
from fastpo.models.policy import Policy
from fastpo.models.trainable import groups
from fastpo.sample import MicroBatch
from fastpo_kernels import TokenStats

# names that the installed torch and transformers are about to change, used by DeepSpeed and peft
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers\.modeling_utils")


def init_distributed() -> tuple[int, int, str]:
    """Starts gloo (CPU) or nccl. Returns (rank, ranks, device). Without a launcher this process is the only rank."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in alone.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # read by DeepSpeed's CPU backend
    local = int(os.environ["LOCAL_RANK"])
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        if device == "cpu":
            # else it compiles a shared-memory all-reduce for inference, unused here: needs a C++ compiler and 30-60 s
            deepspeed.ops.__dict__["__compatible_ops__"] = {}
        backend = "gloo" if device == "cpu" else "nccl"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=60))
    return dist.get_rank(), dist.get_world_size(), device


def ds_config(run: Run) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from the run's own keys."""
    zero: dict[str, Any] = {
        "stage": run.engine.zero,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
    }
    if run.engine.zero == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if run.engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if run.engine.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the step sets the boundary itself
        "gradient_clipping": run.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if run.model.dtype != "float32":
        config["bf16" if run.model.dtype == "bfloat16" else "fp16"] = {"enabled": True}
        if run.engine.zero > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def sharded_loading(run: Run) -> object:
    """While the returned object lives, from_pretrained loads straight into ZeRO-3 shards."""
    if run.engine.zero < 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config(run))


class Engine:
    """A wrapped policy: forward, backward, step, and collectives over all ranks."""

    def __init__(self, run: Run, policy: Policy, total_steps: int, *, universal: bool = False):
        """universal: it will load what `universal` made."""
        self.run, self.ranks, self.universal = run, dist.get_world_size(), universal
        if run.engine.zero == 3:
            for parameter in policy.external_parameters():
                deepspeed.zero.register_external_parameter(policy, parameter)
        trained = groups(policy.model, policy.family.parts, run.optim)
        if policy.value_head is not None:
            trained.append({"params": list(policy.value_head.parameters()), "lr": run.optim.lr_value or run.optim.lr})
        optimizer = torch.optim.AdamW(
            trained,
            betas=run.optim.betas,
            weight_decay=run.optim.weight_decay,
        )
        scheduler = LambdaLR(optimizer, lambda step: schedule_factor(run.optim, step, total_steps))
        self.ds, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            lr_scheduler=scheduler,  # pyright: ignore[reportArgumentType]
            config=ds_config(run) | {"checkpoint": {"load_universal": universal}},
        )
        self.device: torch.device = self.ds.device  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def policy(self) -> Policy:
        return self.ds.module  # pyright: ignore[reportReturnType]

    def stats(self, batch: MicroBatch) -> dict[str, Tensor | None]:
        """The fields of TokenStats, with a value head also value [N] and reward [S]."""
        out = self.ds(batch)
        return (
            out._asdict()
            if isinstance(out, TokenStats)
            else out.tokens._asdict() | {"value": out.value, "reward": out.reward}
        )

    @torch.no_grad()
    def record(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The model's own (logp [N], hidden [N, H]), for the reference cache."""
        return self.ds(batch, record=True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """loss: this rank's share of the global mean; the shares add up over ranks and micro-batches."""
        self.ds.set_gradient_accumulation_boundary(last)
        self.ds.backward(loss * self.ranks)

    def step(self) -> dict[str, float]:
        """Clips, updates and returns the learning rate that was used and the gradient norm before clipping."""
        lr, norm = self.ds.get_lr()[0], None
        if self.run.engine.zero == 0:  # DeepSpeed tells no norm there; .grad is already averaged
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
        self.ds.step()
        norm = self.ds.get_global_grad_norm() if norm is None else norm
        assert norm is not None
        return {"lr": lr, "grad_norm": float(norm)}

    def train(self, mode: bool = True) -> None:
        self.ds.train(mode)

    def all_sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_max(self, value: int) -> int:
        """Largest over ranks."""
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager:
        """Whole parameters under ZeRO-3; all ranks have to enter."""
        sharded = [p for p in parameters if hasattr(p, "ds_id")]
        return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The model as plain modules with all their weights, for generation: no ZeRO-3 hook runs inside.

        With the hooks, ranks that generate answers of different lengths abort.
        """
        if self.run.engine.zero < 3:
            yield
            return
        offload = self.ds.optimizer.parameter_offload  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        parameters = list(self.policy.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()  # pyright: ignore[reportAttributeAccessIssue]
            for hook in offload.forward_hooks + offload.backward_hooks:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                coordinator = offload.get_param_coordinator()
                if not coordinator.is_invalid_trace():
                    coordinator._invalidate_trace()
                offload._register_deepspeed_module(offload.module)

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Optimizer, scheduler and trained weights of all ranks."""
        self.ds.save_checkpoint(
            str(folder), tag="engine", client_state=client_state, save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path, tag: str = "engine") -> dict[str, Any]:
        """Restores what `save` wrote on the same number of ranks, or "universal" on any. Returns the client state."""
        _, state = self.ds.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        assert state is not None, f"{folder} holds no engine state"
        return state


def universal(folder: Path) -> None:
    """Rewrites folder/engine as folder/universal, which any number of ranks can load. Needs as much room again."""
    from deepspeed.checkpoint import ds_to_universal

    partial = folder / "universal.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # progress bars
        ds_to_universal.main(
            Namespace(
                input_folder=str(folder / "engine"), output_folder=str(partial), inject_missing_state=True, **options
            )
        )
    (folder / "latest_universal").unlink()
    partial.rename(folder / "universal")
