"""Which backend runs an op."""

from collections.abc import Callable, Mapping

from torch import Tensor


def choose(backend: str, tensor: Tensor, available: Mapping[str, Callable[[Tensor], bool]]) -> str:
    """Name of the backend that runs an op on `tensor`.

    available: every backend of the op, best first, with a test of whether it can run on a tensor. "auto" is the first
    that can; token_stats alone has a table of devices and shapes that says which is first. Raises ValueError, naming
    the possible ones, for any other backend that is unknown or cannot run.
    """
    usable = [name for name, runs in available.items() if runs(tensor)]
    if backend == "auto" and usable:
        return usable[0]
    if backend in usable:
        return backend
    reason = f"cannot run on a {tensor.device.type} tensor of {tensor.dtype}" if backend in available else "is unknown"
    raise ValueError(
        f"backend {backend!r} {reason}; this version has {', '.join(sorted(available, reverse=True))}, "
        f"of which usable here: {', '.join(usable) or 'none'}"
    )
