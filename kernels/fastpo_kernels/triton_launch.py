"""What a Triton kernel is launched with, as a value: `run` launches it, a test compiles it ahead of time."""

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """A kernel with all that it is given."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int = 1


def run(launch: Launch) -> None:
    launch.kernel[launch.grid](**launch.args, num_warps=launch.num_warps, num_stages=launch.num_stages)
