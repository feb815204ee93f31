"""Compiles the tensor-core kernels for a Hopper GPU on a machine that has none, and reads their machine code.

What it looks for: uniform registers that are read before anything has been written to them. ptxas 12.8 (in
Triton 3.6) has made such code of a loop with two `wgmma` products, one of which then read its matrix from
wherever the register pointed: "illegal memory access", or worse, silently wrong sums. The source was valid.

    python tests/gpu/machine_code.py [--full]

Ends with a JSON object: kernels compiled, and for those with such reads the first of them. Needs Triton's own
cuobjdump; no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_code import Compiler, HopperDriver, compile_for_hardware

from metis.kernels import arguments, projection, splitting

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
_UNIFORM = re.compile(r"gdesc\[UR(\d+)\]|UR(\d+)")
_STORES = ("ST", "RED", "ATOM")

SHORT = ((16384, 768, 16, 32), (16384, 768, 32, 16), (16384, 4096, 64, 64), (300, 200, 5, 7))
"""Tokens, features, columns of V, columns of F."""


def undefined_reads(sass: str) -> list[str]:
    """Return the instructions that read a uniform register which no earlier one writes, in program order.

    A descriptor `gdesc[URn]` is in registers n + 2 and n + 3 (its operand A comes from others).
    """
    written: set[int] = set()
    found = []
    for place, operation, text in _INSTRUCTION.findall(sass):
        operands = [part.strip() for part in text.split(",")]
        target = re.fullmatch(r"UR(\d+)", operands[0])
        sources = operands[1:] if target and not operation.startswith(_STORES) else operands
        read: set[int] = set()
        for descriptor, register in _UNIFORM.findall(",".join(sources)):
            read |= {int(descriptor) + 2, int(descriptor) + 3} if descriptor else {int(register)}
        if read - written:
            found.append(f"{place}: {operation} {text.strip()}")
        if target and not operation.startswith(_STORES):
            first = int(target[1])
            width = 4 if ".128" in operation else 2 if ".64" in operation or "WIDE" in operation else 1
            written |= set(range(first, first + width))
    return found


def disassemble(cubin: bytes) -> str:
    """Return the SASS of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def launches(full: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every launch to compile, by name."""
    shapes = list(SHORT)
    if full:
        ranks = (5, 8, 16, 24, 32, 48, 64, 128)
        shapes = [
            (16384, k, r, q)
            for k in (384, 768, 1024, 2048, 2304, 4096, 200, 208)
            for r in ranks
            for q in ranks
        ]
    seen = set()
    for tokens, features, rank, width in shapes:
        x = torch.empty(tokens, features, dtype=torch.bfloat16)
        v, f = (torch.empty(features, n, dtype=torch.bfloat16) for n in (rank, width))
        p, amax = torch.empty(tokens, rank, dtype=torch.bfloat16), torch.zeros(())
        size = f"[{tokens}, {features}], rank {rank}"
        if size not in seen:
            seen.add(size)
            yield f"project {size}", lambda x=x, v=v: projection.project(x, v, 8)
            yield f"residual {size}", lambda x=x, p=p, v=v, a=amax: projection.residual(x, p, v, a)
            if splitting.can_split(x, v, None, 8):
                yield f"split {size}", lambda x=x, v=v: splitting.split(x, v, 8)
                beside = torch.empty(tokens, features + rank, dtype=torch.bfloat16)[:, features:]
                yield f"split {size}, twice", lambda x=x, v=v, b=beside: splitting.split(x, v, 8, 1, b)
        if projection.is_aligned(v, f):
            yield (
                f"residual {size}, F of {width}",
                lambda x=x, p=p, v=v, a=amax, f=f: projection.residual(x, p, v, a, f),
            )
        if splitting.can_split(x, v, f, 8):
            yield f"split {size}, F of {width}", lambda x=x, v=v, f=f: splitting.split(x, v, 8, 1, None, f)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="many sizes")
    args = parser.parse_args()
    driver.set_active(HopperDriver())
    arguments.reason_unavailable = lambda device: None
    projection.require_device = lambda where, device: None
    compile_for_hardware()
    compiler = Compiler(fuse=False)
    found, count = {}, 0
    for name, launch in launches(args.full):
        launch()
        count += 1
        sass = disassemble(compiler.last.asm["cubin"])
        tensor_core = len(re.findall(r"HGMMA|HMMA", sass))
        if reads := undefined_reads(sass):
            found[name] = reads[0]
        print(f"{name}: {tensor_core} tensor-core instructions, {found.get(name, 'nothing undefined')}")
    print(json.dumps({"triton": triton.__version__, "compiled": count, "found": found}))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
