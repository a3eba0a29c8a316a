"""``python -m tickwork_kernels.compiled``: compile every kernel for sm_90, on any machine, and look at the result.

Registers, spilled bytes and shared memory of every shipped configuration stand in ``compiled.json``; a change that
makes one spill is caught without a GPU. ``--write`` renews the file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("compiled.json")
MODULES = ("head_rows_triton", "head_gemm_triton", "adamw_triton", "multi_lora_triton")
# What an sm_90 multiprocessor gives one block.
SHARED_LIMIT = 227 * 1024


def main() -> int:
    """Compile all, print the table, write or compare the file; return the number of findings."""
    parser = argparse.ArgumentParser(prog="python -m tickwork_kernels.compiled", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew compiled.json")
    options = parser.parse_args()
    measured = measure()
    for name, row in measured["kernels"].items():
        print(f"{name:44} {row}")
    if options.write:
        FILE.write_text(json.dumps(measured, indent=1) + "\n")
        return 0
    findings = compare(measured, json.loads(FILE.read_text()))
    print("\n".join(findings) or f"{len(measured['kernels'])} kernels compile as recorded")
    return len(findings)


def measure() -> dict[str, Any]:
    """Compile every target for sm_90; return the triton version and each kernel's resources."""
    triton = import_module("triton")
    return {"triton": triton.__version__, "kernels": dict(_compile(*target) for target in _targets())}


def compare(measured: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Return what is wrong: spills, too much shared memory and, under the recorded triton, any change."""
    findings = []
    for name, row in measured["kernels"].items():
        before = recorded["kernels"].get(name)
        if before is None:
            findings.append(f"{name}: not recorded; run python -m tickwork_kernels.compiled --write")
            continue
        if row["spilled"] > before["spilled"]:
            findings.append(f"{name}: spills {row['spilled']} bytes, {before['spilled']} recorded")
        if row["shared"] > SHARED_LIMIT:
            findings.append(f"{name}: {row['shared']} bytes of shared memory, more than sm_90 has")
        if measured["triton"] == recorded["triton"] and row != before:
            findings.append(f"{name}: {row}, recorded {before}")
    gone = set(recorded["kernels"]) - set(measured["kernels"])
    return findings + [f"{name}: recorded, but no longer there" for name in sorted(gone)]


def _targets() -> Iterator[tuple[Any, ...]]:
    for module in MODULES:
        yield from import_module(f"tickwork_kernels.{module}").compile_targets()


def _compile(
    name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    compiler, backends = import_module("triton.compiler"), import_module("triton.backends.compiler")
    attributes = _aligned(kernel, signature) if name.startswith(("gemm", "fold", "prob", "down", "up", "outer")) else {}
    source = compiler.ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = import_module("triton").compile(source, target=backends.GPUTarget("cuda", 90, 32), options=options)
    usage = _usage(built.asm["cubin"])
    ptx = built.asm["ptx"]
    products = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
    return name, {**usage, "shared": built.metadata.shared, "products": products}


def _aligned(kernel: Any, signature: dict[str, str]) -> dict[tuple[int, ...], list[list[Any]]]:
    """Tell the compiler what it is told at a launch with ordinary widths: addresses and strides divide by 16."""
    wanted = [
        place
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("stride") or name in ("dim", "low_width")
    ]
    return {(place,): [["tt.divisibility", 16]] for place in wanted}


def _usage(cubin: bytes) -> dict[str, int]:
    """Return registers of a thread and bytes spilled to local memory."""
    tool = Path(str(import_module("triton").__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"]}


if __name__ == "__main__":
    sys.exit(main())
