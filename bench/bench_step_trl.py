"""Whole DPO training steps on multi-image rows: fastpo against TRL's DPOTrainer, on the same model, rows and adapters.

Both update by AdamW with LoRA in fp32. The losses of the first steps have to agree before anything is timed; then a
step of one and a step of the other take turns. Peak bytes are the allocator's own.
Rows go to bench/results/<device>.jsonl.
"""

import json
import platform
import statistics
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from bench.bench_step import peak_bytes
from fastpo.config import Run
from fastpo.data.loader import in_order
from fastpo.engine import Engine, init_distributed
from fastpo.fit import make_feed, make_policy
from fastpo.metrics import Meter
from fastpo.plugins import resolve
from fastpo.step import train_step
from fastpo_kernels import losses
from tests import tiny_families

ROOT = Path(__file__).parent.parent
SIDE, PATCH, IMAGES, PAIRS, VOCABULARY, STEPS = 56, 7, 8, 4, 32_000, 3  # 64 tokens an image
WORDS = "The third picture shows a red bar above a blue square"
# the tests' template has another header before an answer than before one that is to come: TRL would cut elsewhere
TEMPLATE = tiny_families.CHATML.replace("{{ m['role'] }} ", "{{ m['role'] }}\n")
RATE, LORA = 1e-3, {"r": 16, "alpha": 32}


def write(root: Path) -> None:
    """A small LLaVA, and pairs whose prompt holds eight images and about 95 % of a row's tokens."""
    talk = tiny_families.tokenizer(starts=False, template=TEMPLATE)
    ids = talk.get_vocab()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=dict(
                model_type="clip_vision_model", hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                num_attention_heads=4, image_size=SIDE, patch_size=PATCH, projection_dim=32,
            ),
            text_config=dict(
                model_type="llama", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False,
                bos_token_id=ids["<s>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<pad>"],
            ),
            image_token_index=ids["<image>"], tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.save_pretrained(root / "model")
    talk.save_pretrained(root / "model")
    settings = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPImageProcessorPil(**settings).save_pretrained(root / "model")
    draw = torch.Generator().manual_seed(1)
    rows = []
    for n in range(PAIRS):
        names = [f"{n}_{k}.png" for k in range(IMAGES)]
        for name in names:
            pixels = torch.randint(0, 256, (8, 8, 3), generator=draw, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).resize((SIDE, SIDE)).save(root / name)
        rows.append(
            {"images": names, "prompt": f"What is in picture {n}?", "chosen": WORDS[: 24 + n], "rejected": WORDS[n:27]}
        )
    (root / "rows.json").write_text(json.dumps(rows))


def ours(root: Path):
    """One optimizer step of the training loop, data excluded; the policy."""
    run = Run.model_validate(
        {
            "out": root / "out", "seed": 0,
            "model": {"path": str(root / "model"), "family": "llava", "dtype": "float32", "lora": LORA,
                      "gradient_checkpointing": False},
            "data": {"train": {"name": "dpo", "path": str(root / "rows.json")}, "media_root": root, "workers": 0},
            "batch": {"prompts": PAIRS, "tokens": 4096}, "loss": {"name": "dpo", "beta": 0.1},
            "optim": {"lr": RATE, "schedule": "constant", "warmup": 0, "clip": 1.0}, "engine": {"zero": 0},
        }
    )  # fmt: skip
    _, _, device = init_distributed()
    objective = resolve(losses.LOSSES, run.loss, key="loss")
    feed = make_feed(run, 0, 1)
    table = feed.read(run.data.train)
    (window,) = feed.windows(table, in_order(PAIRS, PAIRS))
    engine = Engine(run, make_policy(run, losses.needs(objective), device), 10**6)
    engine.train()
    meter = Meter(("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"))

    def step() -> float:
        train_step(engine, window, objective, meter)
        return meter.reduce()["loss"]

    share = sum(len(e.prompt) for e in table.encoded) / sum(e.tokens for e in table.encoded)
    return step, engine.policy, share


def theirs(root: Path, policy):
    """One step of TRL's DPOTrainer on a batch of all pairs, with the policy's adapters, data excluded."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    config = json.loads((root / "model" / "config.json").read_text())
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(root / "model"), AutoTokenizer.from_pretrained(root / "model"),
        patch_size=PATCH, vision_feature_select_strategy=config["vision_feature_select_strategy"],
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    rows = [
        {
            "images": [Image.open(root / name) for name in row["images"]],
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in json.loads((root / "rows.json").read_text())
    ]
    args = DPOConfig(
        output_dir=str(root / "trl"), per_device_train_batch_size=PAIRS, beta=0.1, max_length=None, learning_rate=RATE,
        lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, max_grad_norm=1.0, max_steps=10**6,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
        logging_steps=10**6, dataloader_num_workers=0,
    )  # fmt: skip
    targets = [name for name, m in policy.model.named_modules() if hasattr(m, "lora_A")]
    targets = [name.removeprefix("base_model.model.") for name in targets]
    trainer = DPOTrainer(
        str(root / "model"), args=args, train_dataset=Dataset.from_list(rows), processing_class=processor,
        peft_config=LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=targets),
    )  # fmt: skip
    start = {k: v.detach().clone() for k, v in policy.model.state_dict().items() if "lora_" in k}
    missing = trainer.model.load_state_dict(start, strict=False).unexpected_keys
    assert not missing and start
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer_and_scheduler(10**6)
    model = trainer.accelerator.prepare(trainer.model)
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # what train() would set

    def step() -> float:
        loss = trainer.training_step(model, dict(batch), torch.tensor(1))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        model.zero_grad()
        return float(loss)

    return step


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trl")
    write(root)
    mine, policy, share = ours(root)
    return mine, theirs(root, policy), share


def bench_dpo_step_against_trl(job, benchmark):
    mine, peer, share = job
    pairs = [(mine(), peer()) for _ in range(STEPS)]
    assert pairs[0][0] == pytest.approx(0.6931, abs=1e-3)
    for got, want in pairs:
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5), pairs
    assert pairs[0] != pairs[-1]

    times = {"fastpo": [], "trl": []}
    for _ in range(9):  # in turns, so that a busy machine slows both
        for name, step in (("fastpo", mine), ("trl", peer)):
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(found) for name, found in times.items()}
    peaks = {"fastpo": peak_bytes(mine), "trl": peak_bytes(peer)}
    import trl

    row = {
        "bench": f"dpo step, {IMAGES} images, {PAIRS} pairs, LoRA, fp32, against TRL {trl.__version__} DPOTrainer",
        "device": f"cpu, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "prompt_share": round(share, 3),
        "losses": [[round(x, 6) for x in pair] for pair in pairs],
        "time_ratio": round(medians["trl"] / medians["fastpo"], 2),
        "memory_ratio": round(peaks["fastpo"] / peaks["trl"], 3),
        "fastpo_s": round(medians["fastpo"], 3),
        "trl_s": round(medians["trl"], 3),
        "fastpo_mib": round(peaks["fastpo"] / 2**20, 1),
        "trl_mib": round(peaks["trl"] / 2**20, 1),
    }
    results = ROOT / "bench" / "results" / "cpu.jsonl"
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    benchmark.extra_info.update(row)
    benchmark.pedantic(mine, rounds=3)
