"""Compiles what would be launched, for a GPU that need not be there, and reads off the binary what it costs."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float64: "fp64",
    torch.bool: "i1",
}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes that one block may have, by compute capability


class Cost(NamedTuple):
    registers: int  # per thread
    spilled: int  # bytes of stack per thread: what the registers could not hold
    shared: int  # bytes per block
    ptx: str


def cost(kernel: Any, args: dict[str, Any], capability: int, **options: int) -> Cost:
    """Compiles `kernel` for sm_<capability> as a launch with `args` (tensors may be on "meta") would.

    The arguments are specialised as at run time: sizes that are 1 become constants, and sizes and addresses that are
    multiples of 16 are known to be (a tensor on "meta" counts as aligned). Without that the figures would be of another
    kernel. Triton keeps what it compiled, so that the next call with the same source, here or in the next test run,
    finds it. options: num_warps, num_stages.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name, value = parameter.name, args[parameter.name]
        kind = "constexpr" if parameter.is_constexpr or value is None else _type(value)
        if isinstance(value, int) and value == 1:
            kind = "constexpr"
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif _divisible(value):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs=attributes)
    made = compile_source(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(made.asm["cubin"])
    return Cost(registers, spilled, made.metadata.shared, made.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of the one kernel in a binary."""
    from triton import knobs

    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", printed)
    return int(found[0]), int(found[1])


def _type(value: object) -> str:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), f"no Triton type for {value!r}"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _divisible(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta or value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
