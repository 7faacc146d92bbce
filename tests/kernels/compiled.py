"""Compiles every configuration of the Triton kernels ahead of time for sm_90, without a GPU, and prints as JSON what it needs:
bytes of shared memory, registers of a thread, and bytes of stack (spilled registers)."""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lrc.formats import FORMATS
from lrc.kernels import triton_quantized, triton_two_factor

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]


def compiled(kernel: Any, given: list[Any], constants: dict[str, Any], sizes: dict[str, int]) -> dict[str, int]:
    names = kernel.arg_names
    fixed = constants | {name: size for name, size in sizes.items() if name.isupper()}
    signature = {name: "constexpr" if name in fixed else kind_of(value) for name, value in zip(names, given, strict=False)}
    signature |= dict.fromkeys(fixed, "constexpr")
    attributes = {(i,): ALIGNED for i, value in enumerate(given) if isinstance(value, torch.Tensor) or value % 16 == 0}
    constexprs = {(names.index(name),): value for name, value in fixed.items()}
    ordered = {name: signature[name] for name in names}
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": sizes["num_warps"], "num_stages": sizes["num_stages"]}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage = resources(made.asm["cubin"])
    return {"shared": made.metadata.shared, "wgmma": int("wgmma" in made.asm["ptx"]), **usage}


def kind_of(value: Any) -> str:
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "stack": int(found[2])}


def main() -> None:
    rows: dict[str, Any] = {}
    for rank, dtype in ((128, torch.bfloat16), (256, torch.float16)):
        x, A, B = torch.zeros(64, 1024, dtype=dtype), torch.zeros(rank, 1024, dtype=dtype), torch.zeros(1024, rank, dtype=dtype)
        given, constants = triton_two_factor.arguments(
            x, A, B, torch.zeros(1024, dtype=dtype), torch.zeros(64, 1024, dtype=dtype)
        )
        for sizes in triton_two_factor.tiles(rank):
            rows[f"two_factor {rank} {dtype} {sizes}"] = compiled(triton_two_factor.two_factor_kernel, given, constants, sizes)
    for name, rank in (("nf3", 128), ("int4", 0)):
        x, y = torch.zeros(64, 1024, dtype=torch.bfloat16), torch.zeros(64, 1024, dtype=torch.bfloat16)
        encoded = FORMATS[name].empty((1024, 1024))
        A, B = (torch.zeros(rank, 1024, dtype=x.dtype), torch.zeros(1024, rank, dtype=x.dtype)) if rank else (None, None)
        given, constants = triton_quantized.arguments(x, encoded, FORMATS[name], A, B, None, y)
        for sizes in triton_quantized.TILES:
            rows[f"quantized {name} {rank} {sizes}"] = compiled(triton_quantized.quantized_kernel, given, constants, sizes)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
