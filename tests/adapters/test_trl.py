"""TRL's own trainers, untouched and fused, step by step on the same tiny model and data."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTTrainer

from fastpo.adapters.trl import fuse
from fastpo_kernels import fused_logp

VOCABULARY = 199
STEPS = 3


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(folder, **changes):
    """Where a tiny random model lies: TRL loads policy and reference from there."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.update(changes)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    return str(folder / "model")


def words(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, VOCABULARY, (n,), generator=generator))


def arguments(out, **changes):
    return dict(
        output_dir=str(out), max_steps=STEPS, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", seed=1,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", logging_steps=1,
        disable_tqdm=True,
    ) | changes  # fmt: skip


def dpo_trainer(out, start, peft=None, **changes):
    pairs = [
        {"prompt": f"{words(3 + i % 3, i)} ", "chosen": words(2 + i % 4, 50 + i), "rejected": words(5 - i % 3, 90 + i)}
        for i in range(8)
    ]
    args = DPOConfig(**arguments(out, **dict(per_device_train_batch_size=2, beta=0.3, max_length=9) | changes))
    return DPOTrainer(
        start,
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        peft_config=peft,
    )


def grpo_trainer(out, start, **changes):
    rollouts = []

    def reward(completion_ids, **_):
        rollouts.append(completion_ids)
        return [sum(t % 7 for t in ids) / 10 for ids in completion_ids]

    args = GRPOConfig(**arguments(out, **dict(
        per_device_train_batch_size=4, num_generations=2, max_completion_length=7, temperature=0.9, beta=0.04,
        epsilon=0.1, epsilon_high=0.15, learning_rate=0.1,
    ) | changes))  # fmt: skip
    prompts = Dataset.from_list([{"prompt": words(3 + i % 3, i)} for i in range(8)])
    made = GRPOTrainer(start, reward_funcs=reward, args=args, train_dataset=prompts, processing_class=tokenizer())
    made.rollouts = rollouts
    return made


def trained(trainer):
    """The loss of every micro-batch, the logged rows, and the weights after the last step."""
    losses, inner = [], trainer.compute_loss

    def compute_loss(*args, **kwargs):
        loss = inner(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = compute_loss
    set_seed(1)  # rollouts and shuffles draw from the global generators
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS and len(losses) >= STEPS
    return losses, rows, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def assert_same_run(plain, fused):
    (losses, rows, weights), (got, got_rows, got_weights) = trained(plain), trained(fused)
    assert got == pytest.approx(losses, rel=1e-5, abs=1e-6)  # at ratio 1 GRPO's terms, of about 1, cancel to 0
    assert len(set(losses)) >= STEPS
    shared = {"rewards/chosen", "rewards/margins", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "grad_norm"}
    for row, got_row in zip(rows, got_rows, strict=True):
        for name in shared & row.keys():
            assert got_row[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(got_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"precompute_ref_log_probs": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}],
    ids=["reference", "precomputed", "accumulated"],
)
def test_dpo_trainer(tmp_path, changes):
    start = model(tmp_path)
    plain, fused = dpo_trainer(tmp_path, start, **changes), fuse(dpo_trainer(tmp_path, start, **changes))
    assert_same_run(plain, fused)


def test_dpo_trainer_with_lora_takes_the_policy_without_its_adapter_as_reference(tmp_path):
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=True
    )
    start = model(tmp_path)
    plain, fused = dpo_trainer(tmp_path, start, lora), fuse(dpo_trainer(tmp_path, start, lora))
    assert_same_run(plain, fused)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo", "num_iterations": 3},
        {"loss_type": "dapo", "gradient_accumulation_steps": 2, "num_iterations": 2, "use_bias_correction_kl": False},
        {"loss_type": "dr_grpo", "beta": 0.0},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 3},
    ],
    ids=["grpo", "dapo", "dr_grpo", "gspo"],
)
def test_grpo_trainer(tmp_path, changes):
    start = model(tmp_path)
    plain, fused = grpo_trainer(tmp_path, start, **changes), fuse(grpo_trainer(tmp_path, start, **changes))
    assert_same_run(plain, fused)
    assert plain.rollouts == fused.rollouts  # the same samples were compared
    clipped = [row["clip_ratio/low_mean"] + row["clip_ratio/high_mean"] for row in plain.state.log_history[:STEPS]]
    assert any(clipped) == ("num_iterations" in changes)


def test_under_autocast_the_head_runs_in_its_dtype_as_the_model_s_own_would(tmp_path):
    policy = fuse(dpo_trainer(tmp_path, model(tmp_path))).model
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    seen = []

    def fused(hidden, weight, **head):
        seen.extend([hidden.dtype, weight.dtype])
        return fused_logp(hidden, weight, ids, **head)

    with torch.autocast("cpu", torch.bfloat16):
        got = policy(ids, fused=fused)
        want = policy(ids).logits.float()[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert seen == [torch.bfloat16] * 2 and got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=0.1)  # theirs rounds logits of up to 10 to bf16
    got.sum().backward()
    assert policy.lm_head.weight.grad.dtype == torch.float32


def test_refuses_what_it_does_not_compute(tmp_path):
    start = model(tmp_path)
    for changes, message in (
        ({"loss_type": ["ipo"]}, "loss_type"),
        ({"f_divergence_type": "js_divergence"}, "js_divergence"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"use_weighting": True}, "use_weighting"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse(dpo_trainer(tmp_path, start, **changes))
    for changes, message in (
        ({"loss_type": "bnpo"}, "bnpo"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, "per sequence"),
        ({"delta": 1.5}, "delta"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse(grpo_trainer(tmp_path, start, **changes))
    with pytest.raises(ValueError, match="logits_scaling"):
        fuse(dpo_trainer(tmp_path, model(tmp_path / "scaled", logits_scaling=2.0)))
    with pytest.raises(TypeError, match="got SFTTrainer"):
        fuse(SFTTrainer.__new__(SFTTrainer))
    trainer = fuse(dpo_trainer(tmp_path, start))
    with pytest.raises(ValueError, match="compute_metrics"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)
