"""The bare PyTorch loop of kernels/README.md, as printed there, against eager code."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastpo_kernels import fused_dpo

README = Path(__file__).parents[2] / "kernels/README.md"


def model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )  # fmt: skip
    )


def batches():
    for seed in range(3):
        ids = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(seed))
        labels = ids.masked_fill(torch.arange(9) < torch.tensor([3, 5, 3, 5])[:, None], -100)
        yield {"input_ids": ids, "labels": labels}


def log_probs(policy, batch):
    labels = batch["labels"][:, 1:]
    table = policy(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    return (table.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)


def test_the_loop_of_the_readme_trains_as_eager_code_does():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (loop,) = [block for block in blocks if block.startswith("for batch in batches")]
    policy, reference = model(), model()
    plain, losses = copy.deepcopy(policy), []
    recorded = {"fused_dpo": lambda *args, **options: losses.append(fused_dpo(*args, **options)) or losses[-1]}
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    given = {"torch": torch, "policy": policy, "reference": reference, "optimizer": optimizer, "batches": batches()}
    exec(loop, given | recorded)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for batch, (got, _) in zip(batches(), losses, strict=True):
        with torch.no_grad():
            ref = log_probs(reference, batch)
        s = log_probs(plain, batch) - ref
        loss = -F.logsigmoid(0.1 * (s[:2] - s[2:])).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert got.item() == pytest.approx(loss.item(), rel=1e-5)
    for p, q in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
