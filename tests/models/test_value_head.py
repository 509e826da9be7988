import torch

from fastpo.models.head import ValueHead


def test_rewards_of_a_half_precision_model_are_not_rounded_to_its_digits():
    head = ValueHead(33, torch.bfloat16)
    hidden = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    assert torch.equal(head(hidden), torch.zeros(50))
    head.weight.data = torch.randn(1, 33, generator=torch.Generator().manual_seed(1)).bfloat16() * 4
    exact = hidden.double() @ head.weight[0].double()
    got = head(hidden)
    assert got.dtype == torch.float32 and (got - exact).abs().max() < 1e-6 * exact.abs().max()
    d_exact = torch.autograd.grad(exact.sum(), [hidden, head.weight])
    for mine, want in zip(torch.autograd.grad(got.sum(), [hidden, head.weight]), d_exact, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, want, rtol=8e-3, atol=0.05)
