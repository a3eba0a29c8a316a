"""The layers of the README, held by walking the imports of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
TORCH_ROOMS = {"compute", "store.py", "recipes"}
# Functions that import torch or transformers themselves, when called: only their callers pay.
LAZY = {"tensors.py": {"torch"}, "executor.py": set(), "models": {"transformers"}, "cli.py": {"transformers"}}

# Room -> the rooms of tickwork it may import.
MAY = {
    "errors.py": set(),
    "tensors.py": {"errors"},
    "types.py": {"errors", "tensors"},
    "files.py": set(),
    "results.py": {"errors", "tensors", "types"},
    "convert.py": {"errors", "tensors", "types"},
    "requests.py": {"tensors", "types"},
    "futures.py": {"errors"},
    "records.py": {"errors", "results", "types"},
    "seal.py": {"errors", "files"},
    "catalogue.py": {"errors", "files", "records", "results"},
    "models": {"errors", "results"},
    "journal": {"errors", "files", "futures", "journal", "requests", "results", "tensors", "types"},
    "engine": {"errors", "futures", "engine", "executor"},
    "executor.py": {"engine", "futures", "compute", "catalogue"},
    "compute": {
        *("compute", "convert", "engine", "errors", "requests", "results"),
        *("tensors", "types", "models", "records", "store", "catalogue"),
    },
    "store.py": {"catalogue", "compute", "errors", "files", "records", "results", "seal"},
    "kept": {
        *("build", "engine", "errors", "futures", "journal", "kept"),
        *("records", "requests", "results", "types"),
    },
    "clients": {
        *("clients", "engine", "executor", "errors", "futures", "catalogue", "kept"),
        *("build", "convert", "models", "requests", "results", "seal", "tensors", "types"),
    },
    "build.py": {"convert", "engine", "errors", "records", "requests", "results", "seal", "types"},
    "server": {
        *("build", "catalogue", "clients", "convert", "engine", "errors", "files", "futures", "journal"),
        *("models", "requests", "results", "server", "tensors", "types"),
    },
    "testing.py": {"engine", "errors", "executor", "futures"},
}


def room(file: Path) -> str:
    """Return the first part of a file's path inside its package."""
    return file.relative_to(ROOT / "src" / "tickwork").parts[0]


def imported(file: Path, *, top_level: bool) -> set[str]:
    """Return the dotted names a file imports, for types alone excepted."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def tops(names: set[str]) -> set[str]:
    """Return the distributions' import names."""
    return {name.split(".")[0] for name in names}


TICKWORK = [file for file in FILES if "tickwork" in file.relative_to(ROOT).parts]
KERNELS = [file for file in FILES if file not in TICKWORK]


@pytest.mark.parametrize("file", TICKWORK, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_torch_and_trio_stay_in_their_rooms(file: Path) -> None:
    """Torch lives in compute, store and recipes; trio never in compute or journal; both meet only in the executor."""
    every = tops(imported(file, top_level=False))
    if room(file) not in TORCH_ROOMS:
        assert "torch" not in every - LAZY.get(room(file), set())
        assert not {"torch", "transformers"} & tops(imported(file, top_level=True))
    if room(file) in {"compute", "journal", "kept", "store.py"}:
        assert "trio" not in every


@pytest.mark.parametrize("file", TICKWORK, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_imports_run_in_one_direction(file: Path) -> None:
    """Each room imports only the rooms that the table allows."""
    own = {name.split(".")[1] for name in imported(file, top_level=False) if name.startswith("tickwork.")}
    if room(file) in MAY:
        assert own <= MAY[room(file)]
    if room(file) == "engine":
        assert not any(name.startswith("tickwork.compute") for name in imported(file, top_level=False))


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.name)
def test_kernels_know_nothing_of_tickwork(file: Path) -> None:
    """The kernel package stands alone on torch and triton."""
    assert tops(imported(file, top_level=False)) <= {"torch", "triton", "tickwork_kernels", *sys.stdlib_module_names}


def test_importing_tickwork_does_not_import_torch() -> None:
    """Torch is loaded when the first model is built, not before."""
    code = "import sys, tickwork; tickwork.ServiceClient(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_journal_in_process_needs_nothing_of_the_server(tmp_path: Path) -> None:
    """The extra packages of the server are loaded by the server alone."""
    extra = {"starlette", "orjson", "zstandard", "httptools", "google.protobuf", "pydantic", "prometheus_client"}
    code = f"""
import sys, tickwork, tickwork.kept.catch_up
with tickwork.ServiceClient(store={str(tmp_path)!r}, journal="process") as service:
    service.resumable()
sys.exit(bool({extra} & sys.modules.keys()))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_exported_once_and_sorted() -> None:
    """Every public name of the package is in __all__, and every name there exists."""
    import tickwork

    public = {name for name in vars(tickwork) if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(tickwork, name), type(tickwork))}
    assert public - modules - {"version"} == set(tickwork.__all__)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_readable(file: Path) -> None:
    """A file past 300 lines asks what to take out; debts are not left in comments."""
    text = file.read_text()
    assert text.count("\n") <= 300
    assert not any(mark in text for mark in ("TODO", "FIXME", "XXX"))
