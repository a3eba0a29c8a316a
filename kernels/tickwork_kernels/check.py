"""``python -m tickwork_kernels.check``: run every registered implementation through the conformance suite.

On CPU, Triton kernels run in Triton's interpreter, which proves indexing, masks and algebra, not speed or races.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module

import torch

from tickwork_kernels.registry import RefusedError

Check = Callable[[str, torch.device], str | None]
QUICK = 6
OPERATIONS = ("head", "losses", "adamw", "multi_lora")


def main(arguments: list[str] | None = None) -> int:
    """Run the suite, print a line for each check that fails or is refused, and return the number of failures."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for plugin in options.plugin:
        try:
            import_module(plugin)
        except ModuleNotFoundError as error:
            parser.error(f"--plugin {plugin}: {error}")
    known = [name for operation in options.only or OPERATIONS for name in _names(operation)]
    if unknown := set(options.impl) - set(known):
        parser.error(f"--impl {', '.join(sorted(unknown))}: there is none; known: {', '.join(dict.fromkeys(known))}")
    if device.type == "cpu":
        # Read when kernels are first imported, below.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    failures = passed = without = 0
    for operation in options.only or OPERATIONS:
        for implementation, suite in _suite(operation, options.impl):
            checks = suite[:QUICK] if options.quick else suite
            begun, refused = time.perf_counter(), list[tuple[str, str]]()
            for name, check in checks:
                answer = run(check, implementation, device)
                passed += answer is None
                if answer is not None and answer.startswith("FAILED"):
                    failures += 1
                    print(f"{operation} {implementation}: {name}: {answer}", flush=True)
                elif answer is not None:
                    refused.append((name, answer))
            without += len(refused)
            took = time.perf_counter() - begun
            print(f"{operation} {implementation}: {len(checks)} checks in {took:.1f} s", flush=True)
            for name, reason in _short(refused):
                print(f"    not checked: {name} ({reason})")
    print(f"{passed} checks passed, {without} were refused by name, {failures} failed")
    return min(failures, 100)


def _short(refused: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return each reason once, with the checks it stands for."""
    names: dict[str, list[str]] = {}
    for name, answer in refused:
        # A refusal ends with the alternatives, which differ from check to check.
        names.setdefault(answer.split("; able to run")[0], []).append(name)
    return [("; ".join(each) if len(each) < 9 else f"{len(each)} checks", reason) for reason, each in names.items()]


def run(check: Check, implementation: str, device: torch.device) -> str | None:
    """Run one check; return ``FAILED`` and why, why it does not apply, or None."""
    try:
        return check(implementation, device)
    except RefusedError as refusal:
        return str(refusal)
    except Exception as error:  # whatever an implementation raises is its failure, not the suite's end
        return f"FAILED: {type(error).__name__}: {error}"


def _suite(operation: str, only: list[str]) -> Iterator[tuple[str, list[tuple[str, Check]]]]:
    """Yield each implementation's name with its checks."""
    checks = import_module(f"tickwork_kernels.conformance.{operation}").checks()
    for name in _names(operation):
        if not only or name in only:
            yield name, checks


def _names(operation: str) -> list[str]:
    if operation == "losses":
        return list(import_module("tickwork_kernels.token_losses").token_losses())
    module, registry = {
        "head": ("heads", "HEADS"),
        "adamw": ("adamw", "ADAMW"),
        "multi_lora": ("multi_lora", "MULTI_LORA"),
    }[operation]
    return [each.name for each in getattr(import_module(f"tickwork_kernels.{module}"), registry).all()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tickwork_kernels.check", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu (Triton interpreted) or cuda")
    parser.add_argument("--only", action="append", choices=OPERATIONS, help="an operation; may be repeated")
    parser.add_argument("--impl", action="append", default=[], help="an implementation or loss; may be repeated")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} checks of each: for slow tools, as sanitizers")
    parser.add_argument("--plugin", action="append", default=[], help="a module that registers more; may be repeated")
    return parser


if __name__ == "__main__":
    sys.exit(main())
