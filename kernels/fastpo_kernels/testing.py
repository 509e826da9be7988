"""What tests and benchmarks of the kernels share: error bounds, GEMM counts, poisoned scratch memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def max_error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute error; inf where got is not finite. 0 for empty tensors."""
    error = (got.double() - exact.double()).abs().nan_to_num(nan=torch.inf)
    return error.max().item() if error.numel() else 0.0


def assert_no_worse(got: Tensor, plain: Tensor, exact: Tensor, *, eps: float, what: str = "") -> None:
    """max error of got <= 2 * max error of plain + eps * max |exact|.

    plain: the same quantity by ordinary eager code in the dtype of the inputs; exact: in float64 from the same rounded
    inputs. eps covers the cases in which plain code happens to be exact: a few times the epsilon of the output dtype.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    scale = exact.double().abs().max().item() if exact.numel() else 0.0
    ours, theirs = max_error(got, exact), max_error(plain, exact)
    bound = 2 * theirs + eps * scale
    assert ours <= bound, f"{what}: error {ours:.3g}, plain code {theirs:.3g}, bound {bound:.3g}"


def gemm_passes(run: Callable[[], object], rows: int, size: int, vocabulary: int) -> float:
    """Matrix products of run(), forward and backward, in passes of 2 * rows * size * vocabulary operations."""
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch's table lacks it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops() / (2 * rows * size * vocabulary)


@contextmanager
def nan_scratch() -> Iterator[None]:
    """Uninitialised memory reads as NaN (the largest value in integer tensors), so that a read before a write shows."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore[reportAttributeAccessIssue]
