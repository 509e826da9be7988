"""Whole training steps to compare and to take apart: small models and rows on disk, a step of fastpo, a step of TRL.

On CUDA the models are those of 0.5B, in bf16, with pictures of 256 tokens. On the CPU they are small, with the head's
share of the work of one position as there (0.28), and, in videos, attention's share of a 7B model's step at the same
number of frames.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from bench.harness import CUDA, peak_bytes, synchronize
from fastpo.config import Run
from fastpo.data import synthetic
from fastpo.data.loader import Feed, Table, in_order
from fastpo.engine import Engine, init_distributed
from fastpo.fit import make_feed, make_policy
from fastpo.plugins import resolve
from fastpo.sample import MicroBatch
from fastpo.step import meter_for, train_step
from fastpo_kernels import losses
from tests import tiny_families

IMAGES = 8
DTYPE = "bfloat16" if CUDA else "float32"
RATE, LORA = 1e-3, {"r": 16, "alpha": 32}
PARTS: tuple[str, ...] = (
    "data",
    "vision",
    "language, reference",
    "language",
    "head",
    "head, backward",
    "language, backward",
)
PARTS += ("optimizer", "rest")
# the tests' template has another header before an answer than before one that is to come: TRL would cut elsewhere
TEMPLATE = tiny_families.CHATML.replace("{{ m['role'] }} ", "{{ m['role'] }}\n")


class Size(NamedTuple):
    side: int  # of a picture, in pixels
    patch: int
    vision: tuple[int, int, int, int]  # hidden, intermediate, layers, heads
    text: tuple[int, int, int, int, int]  # the same, and key heads
    vocabulary: int


QWEN = Size(224, 14, (1024, 4096, 24, 16), (896, 4864, 24, 14, 2), 151_936)
PICTURES = QWEN if CUDA else Size(56, 7, (128, 256, 4, 4), (256, 512, 4, 4, 4), 4096)
VIDEO = QWEN if CUDA else Size(64, 8, (128, 512, 2, 4), (384, 2048, 2, 6, 2), 4096)


def write_pictures(root: Path) -> list[str]:
    """root/model, a LLaVA, and the paths of IMAGES pictures below root."""
    _save(root / "model", PICTURES, "clip_vision_model", "llama", LlavaConfig, LlavaForConditionalGeneration)
    side = PICTURES.side
    settings: dict[str, Any] = dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    CLIPImageProcessorPil(**settings).save_pretrained(root / "model")
    draw = np.random.default_rng(1)
    names = [f"{n}.png" for n in range(IMAGES)]
    for name in names:
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side)).save(root / name)
    return names


def write_video(root: Path, frames: int) -> str:
    """root/model, a LLaVA-Video, and the path of a clip of so many frames below root."""
    kinds = ("siglip_vision_model", "qwen2", LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration)
    _save(root / "model", VIDEO, *kinds)
    size = dict(height=VIDEO.side, width=VIDEO.side)
    settings = dict(image_processor_type="LlavaOnevisionImageProcessor", size=size, resample=3)
    (root / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = np.random.default_rng(1).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    synthetic.encode(root / "clip.mp4", pixels.repeat(16, 1).repeat(16, 2))
    return "clip.mp4"


def _save(folder: Path, size: Size, tower: str, body: str, config: Any, model: Any) -> None:
    talk = tiny_families.tokenizer(starts=False, template=TEMPLATE)
    ids = talk.get_vocab()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    vision: dict[str, Any] = dict(zip(names, size.vision, strict=False), model_type=tower)
    vision |= dict(image_size=size.side, patch_size=size.patch)
    vision |= dict(projection_dim=32) if tower == "clip_vision_model" else dict(vision_use_head=False)
    text = dict(
        zip(names, size.text, strict=True), model_type=body, vocab_size=size.vocabulary, tie_word_embeddings=False,
        max_position_embeddings=32_768, bos_token_id=None, eos_token_id=ids["<|im_end|>"],
        pad_token_id=talk.pad_token_id,
    )  # fmt: skip
    options: dict[str, Any] = dict(vision_config=vision, text_config=text, tie_word_embeddings=False)
    options |= dict(image_token_index=ids["<image>"])
    if config is LlavaOnevisionConfig:
        options |= dict(video_token_index=ids["<video>"], vision_feature_layer=-1)
        options |= dict(vision_feature_select_strategy="full", image_grid_pinpoints=[[size.side] * 2])
    torch.manual_seed(0)
    made: PreTrainedModel = model(config(**options))
    made.to(getattr(torch, DTYPE)).save_pretrained(folder)
    talk.save_pretrained(folder)


class Step(NamedTuple):
    data: Callable[[], Any]  # decodes and packs or pads one batch
    train: Callable[[Any], float]  # one optimizer step on it; its loss
    modules: dict[str, nn.Module]  # whose forward is a part
    backward: tuple[Any, str]  # owner and name of the method
    update: tuple[Any, str]


class Ours(NamedTuple):
    step: Step
    engine: Engine
    feed: Feed
    table: Table


def config(
    root: Path, rows: list[dict[str, Any]], reader: str, family: str, loss: dict[str, Any], frames: int = 1
) -> Run:
    """A run that takes all rows in one step."""
    file = root / f"{reader}{frames}.json"
    file.write_text(json.dumps(rows))
    return Run.model_validate(
        {
            "out": root / "out", "seed": 0,
            "model": {"path": str(root / "model"), "family": family, "dtype": DTYPE, "lora": LORA,
                      "gradient_checkpointing": False},
            "data": {"train": {"name": reader, "path": str(file)}, "media_root": root, "workers": 0, "frames": frames},
            "batch": {"prompts": len(rows), "tokens": 65_536}, "loss": loss,
            "optim": {"lr": RATE, "schedule": "constant", "warmup": 0, "clip": 1.0},
            "engine": {"zero": 0 if DTYPE == "float32" else 1},  # 1 keeps fp32 master weights
        }
    )  # fmt: skip


def ours(run: Run) -> Ours:
    """The training loop's step on all rows at once."""
    _, _, device = init_distributed()
    objective = resolve(losses.LOSSES, run.loss, key="loss")
    feed = make_feed(run, 0, 1)
    table = feed.read(run.data.train)
    engine = Engine(run, make_policy(run, losses.needs(objective), device), 10**6)
    engine.train()
    meter = meter_for(objective, engine.device)

    def train(window: list[MicroBatch]) -> float:
        train_step(engine, window, objective, meter)
        return meter.reduce()["loss"]

    policy = engine.policy
    modules = _modules(policy.core) | {"head": policy.head}
    return Ours(Step(batches(feed, table), train, modules, (engine, "backward"), (engine, "step")), engine, feed, table)


def batches(feed: Feed, table: Table) -> Callable[[], list[MicroBatch]]:
    return lambda: next(feed.windows(table, in_order(len(table), len(table))))


def theirs(root: Path, rows: list[dict[str, Any]], policy: Any) -> tuple[Step, Step]:
    """TRL's DPOTrainer on all pairs at once, from the policy's adapters: as it comes, and with a compact head.

    Its head is applied to every position, except on devices where its Triton kernels run: there to the labelled ones
    alone (trl/trainer/utils.py:1642). The second step does that on any device, and updates the same model.
    """
    from datasets import Dataset
    from peft import LoraConfig

    trl: Any = import_module("trl")
    utils: Any = import_module("trl.trainer.utils")
    folder = root / "model"
    facts = json.loads((folder / "config.json").read_text())
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder),
        patch_size=PICTURES.patch, vision_feature_select_strategy=facts["vision_feature_select_strategy"],
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    table = [
        {key: [{"role": role, "content": row[key]}] for key, role in roles.items()}
        | {"images": [Image.open(root / name) for name in row["images"]]}
        for row in rows
    ]
    args = trl.DPOConfig(
        output_dir=str(root / "trl"), per_device_train_batch_size=len(rows), beta=0.1, max_length=None,
        learning_rate=RATE, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, max_grad_norm=1.0,
        max_steps=10**6, use_cpu=not CUDA, bf16=False, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True, logging_steps=10**6, dataloader_num_workers=0, model_init_kwargs={"dtype": DTYPE},
    )  # fmt: skip
    targets = [name for name, m in policy.model.named_modules() if hasattr(m, "lora_A")]
    targets = [name.removeprefix("base_model.model.") for name in targets]
    trainer = trl.DPOTrainer(
        str(folder), args=args, train_dataset=Dataset.from_list(table), processing_class=processor,
        peft_config=LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=targets),
    )  # fmt: skip
    start = {k: v.detach().clone() for k, v in policy.model.state_dict().items() if "lora_" in k}
    assert start and not trainer.model.load_state_dict(start, strict=False).unexpected_keys
    trainer.create_optimizer_and_scheduler(10**6)
    model = trainer.model.to(trainer.accelerator.device)  # prepared, it would be in DDP: our process group is there
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # what train() would set
    loader = trainer.get_train_dataloader()

    def train(batch: dict[str, Tensor]) -> float:
        loss = trainer.training_step(model, dict(batch), torch.tensor(1))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        model.zero_grad()
        return float(loss)

    def compact(batch: dict[str, Tensor]) -> float:
        own, utils._use_triton = utils._use_triton, lambda device: True
        try:
            return train(batch)
        finally:
            utils._use_triton = own

    step = Step(
        lambda: next(iter(loader)), train, _modules(model.get_base_model()),
        (trainer.accelerator, "backward"), (trainer.optimizer, "step"),
    )  # fmt: skip
    return step, step._replace(train=compact)


def _modules(core: Any) -> dict[str, nn.Module]:
    inside = core.model
    found = {"vision": inside.vision_tower, "projector": inside.multi_modal_projector}
    return found | {"language": inside.language_model}


def parts(step: Step, read: Callable[[], float]) -> dict[str, float]:
    """How far read() goes (seconds, operations) in each of PARTS during one step, its data included.

    "vision": tower and projector. "rest": what lies between the parts: the loss, embeddings, masks, our bookkeeping,
    and, where the head is no module (TRL's), the head.
    """
    last = read()
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def mark(part: str) -> None:
        nonlocal last
        now = read()
        found[part] += now - last
        last = now

    def left(part: str, out: Any) -> None:
        if part != "language":
            mark("vision" if part == "projector" else part)
        elif torch.is_grad_enabled():
            mark("language")
            out.last_hidden_state.register_hook(lambda grad: mark("head, backward"))
        else:
            mark("language, reference")

    with _around(step.backward, mark, "language, backward"), _around(step.update, mark, "optimizer"):
        hooks = []
        for part, module in step.modules.items():
            hooks.append(module.register_forward_pre_hook(lambda *_: mark("rest")))
            hooks.append(module.register_forward_hook(lambda module, given, out, part=part: left(part, out)))
        batch = step.data()
        mark("data")
        step.train(batch)
        mark("rest")
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _around(method: tuple[Any, str], mark: Callable[[str], None], part: str) -> Iterator[None]:
    """Marks where the method of this one object begins and ends."""
    owner, name = method
    inner = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        mark("rest")
        out = inner(*args, **options)
        mark(part)
        return out

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


def seconds() -> float:
    synchronize()
    return time.perf_counter()


class Measured(NamedTuple):
    ms: float  # median of a step, its data excluded
    taken: dict[str, float]  # seconds of each part, the median
    counted: dict[str, float]  # operations of each part
    attention: float  # operations of attention's products
    peak_mib: float

    @property
    def gflop(self) -> float:
        return sum(self.counted.values()) / 1e9

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """Of each part: milliseconds, its share of the time, its share of the counted operations."""
        whole, count = sum(self.taken.values()), sum(self.counted.values())
        return {
            part: {
                "ms": round(1e3 * self.taken[part], 1),
                "share": round(self.taken[part] / whole, 3),
                "counted_share": round(self.counted[part] / count, 3),
            }
            for part in PARTS
        }

    def table(self, title: str) -> str:
        lines = [f"\n{title}", f"{'part':20} {'ms':>8} {'share':>6} {'counted':>8} {'GFLOP/s':>8}"]
        for part, row in self.parts.items():
            speed = self.counted[part] / self.taken[part] / 1e9 if self.taken[part] else 0.0
            lines.append(f"{part:20} {row['ms']:8.1f} {row['share']:6.1%} {row['counted_share']:8.1%} {speed:8.1f}")
        return "\n".join(lines)


def measure(runs: dict[str, Step], rounds: int = 3) -> dict[str, Measured]:
    """Steps in turns, on one thread, so that a busy machine slows all of them. Each has run twice before, counted."""
    torch.set_num_threads(1)  # accelerate and DeepSpeed have set their own number
    counted, attention, peaks = {}, {}, {}
    for name, step in runs.items():
        with operations() as counter:
            counted[name] = parts(step, lambda counter=counter: float(counter.get_total_flops()))
        products = counter.get_flop_counts()["Global"]
        attention[name] = sum(count for op, count in products.items() if "attention" in str(op))
        batch = step.data()
        peaks[name] = peak_bytes(lambda step=step, batch=batch: step.train(batch)) / 2**20
    names, found = list(runs), {name: [] for name in runs}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(parts(runs[name], seconds))
    return {
        name: Measured(
            1e3 * median(sum(turn.values()) - turn["data"] for turn in turns),
            {part: median(turn[part] for turn in turns) for part in PARTS},
            counted[name],
            attention[name],
            peaks[name],
        )
        for name, turns in found.items()
    }


@contextmanager
def operations() -> Iterator[FlopCounterMode]:
    """Counts the operations of matrix products and attention; half of the scores where attention is causal."""
    aten = torch.ops.aten
    more = {
        aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        yield counter


def _attention(q, k, v, dropout=0.0, causal=False, **_) -> int:
    rows, heads, queries, size = q
    return 4 * rows * heads * queries * k[2] * size // (1 + causal)


def _attention_backward(grad, q, k, v, out, sums, dropout, causal, **_) -> int:
    """Five products for the forward's two."""
    return _attention(q, k, v, dropout, causal) * 5 // 2
