import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2Model

from fastpo.models.tiled_mlp import tile_mlp
from fastpo.models.trainable import enable_checkpointing
from fastpo_kernels.testing import max_error
from tests.memory import peak_bytes

TOKENS, TILE, SIZE, WIDE = 37, 8, 16, 88


def model(*, lora=False, dtype=torch.float64, layers=2):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=SIZE, intermediate_size=WIDE, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    made = Qwen2Model(config).to(dtype)
    if lora:
        made = get_peft_model(made, LoraConfig(r=3, target_modules=["gate_proj", "down_proj"], init_lora_weights=False))
        made = made.to(dtype)
    return made.train()


def layers(made):
    return made.get_base_model() if hasattr(made, "peft_config") else made


def results(made, dtype=torch.float64):
    """Hidden states, and the gradients of the input and of what is trained."""
    x = torch.randn(1, TOKENS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.to(dtype).requires_grad_()
    out = made(inputs_embeds=x, use_cache=False).last_hidden_state
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
    return {"hidden": out.detach(), "input": x.grad} | {k: p.grad for k, p in made.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_values_and_gradients_equal_the_whole_mlp(lora, checkpointing):
    plain = model(lora=lora)
    tiled = copy.deepcopy(plain)
    tile_mlp(layers(tiled), TILE)
    if checkpointing:
        enable_checkpointing(layers(tiled))
    want, got = results(plain), results(tiled)
    assert sum(g is not None for g in want.values()) > 8
    for name, value in want.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_of_bf16_weights_are_nearly_those_of_one_product():
    """A sum over tiles in bf16 rounds once per tile."""
    exact = results(model(dtype=torch.bfloat16).double())
    plain = results(model(dtype=torch.bfloat16), torch.bfloat16)
    tiled = model(dtype=torch.bfloat16)
    tile_mlp(tiled, TILE)
    got = results(tiled, torch.bfloat16)
    for name in (name for name in exact if "mlp" in name):
        ours, theirs = (max_error(x[name], exact[name]) for x in (got, plain))
        print(f"{name}: {ours:.3g}, whole {theirs:.3g}, of {exact[name].abs().max():.3g}")
        assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps * exact[name].abs().max(), name


def test_hooks_of_mlps_and_parameters_fire_once():
    """What gathers a weight and what reduces its gradient (ZeRO, FSDP) sees one MLP and one gradient."""
    made, fired = model(), []
    tile_mlp(made, TILE)
    for layer in made.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: fired.append("in"))
        layer.mlp.register_forward_hook(lambda *_: fired.append("out"))
        layer.mlp.register_full_backward_hook(lambda *_: fired.append("backward"))
        for parameter in layer.mlp.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: fired.append("gradient"))
    results(made)
    assert {what: fired.count(what) for what in fired} == {"in": 2, "out": 2, "backward": 2, "gradient": 6}


def test_memory_of_a_long_row_is_that_of_a_tile():
    """A whole MLP holds three [T, intermediate] without gradient, more with it."""
    mlp = model(dtype=torch.float32, layers=1)
    tiled = copy.deepcopy(mlp)
    tile_mlp(tiled, 64)
    x = torch.randn(1, 2048, SIZE)
    row = 2048 * WIDE * 4

    def step(made):
        out = made.layers[0].mlp(x.clone().requires_grad_())
        out.backward(torch.ones_like(out))
        made.zero_grad()

    def forward(made):
        with torch.no_grad():
            made.layers[0].mlp(x)

    for run in (forward, step):
        whole, ours = peak_bytes(partial(run, mlp)), peak_bytes(partial(run, tiled))
        print(f"{run.__name__}: {ours / row:.2f} of [T, intermediate] in place of {whole / row:.2f}")
        assert whole > 2.9 * row and ours < whole / 3


def test_a_tile_has_tokens():
    with pytest.raises(ValueError, match="at least one token, got 0"):
        tile_mlp(model(), 0)
