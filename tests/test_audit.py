"""What the code depends on and never does: vulnerable versions, pickles, and text that is run."""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CI = ROOT / ".ci"

spec = importlib.util.spec_from_file_location("audit", CI / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

ADVISORIES = audit.read_advisories((CI / "advisories.txt").read_text())
PINS = audit.read_requirements((CI / "constraints.txt").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
# Modules whose files run code when they are read; functions that run text; arguments that let a reader do either.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load"}
ARGUMENTS = {"allow_pickle", "trust_remote_code"}


def test_no_pinned_version_is_known_to_be_vulnerable():
    """Without a network: against the list that is kept."""
    assert audit.audit(PINS, ADVISORIES) == []


def test_no_range_begins_with_a_vulnerable_version():
    """The least version that pyproject.toml allows is held to the list too."""
    extras = [each for group in PROJECT["optional-dependencies"].values() for each in group]
    assert audit.audit([*PROJECT["dependencies"], *extras], ADVISORIES) == []


def test_everything_that_the_server_needs_is_pinned():
    pinned = {audit.canonicalize_name(audit.Requirement(each).name) for each in PINS}
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["server"]]
    assert {audit.canonicalize_name(audit.Requirement(each).name) for each in needed} <= pinned


@pytest.mark.parametrize("pin", ["torch==2.5.1", "starlette==0.49.0", "Starlette>=0.39", "protobuf==6.31.0"])
def test_a_bad_pin_is_found(pin):
    found = audit.audit([*PINS, pin], ADVISORIES)
    assert found
    assert "CVE-" in found[0]


@pytest.mark.parametrize("pin", ["torch==2.6.0", "starlette==0.49.1", "protobuf==5.29.5", "protobuf==4.25.8"])
def test_a_mended_version_is_none(pin):
    assert audit.audit([pin], ADVISORIES) == []


@pytest.mark.parametrize("line", ["torch", "torch <2.6", "torch <2.6 CVE-1", "torch what CVE-1 it is"])
def test_a_line_that_is_no_advisory_is_told(line):
    with pytest.raises(ValueError, match=r"PACKAGE|specifier"):
        audit.read_advisories(line)


def dangers(text: str) -> list[str]:
    """Return what a file does that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
            found += [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in CALLS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in CALLS or name in BUILTINS else []
            found += [
                ast.unparse(each)
                for each in node.keywords
                if each.arg in ARGUMENTS and not (isinstance(each.value, ast.Constant) and each.value.value is False)
            ]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_that_is_read_can_run(file):
    """No pickle in any form, and no text that becomes code: weights are safetensors, and graphs are data."""
    assert dangers(file.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import numpy, shelve",
        "def f():\n    from marshal import loads",
        "from joblib.externals import x",
        "torch.load(f, weights_only=True)",
        "from torch import load",
        "yaml.load(f)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "eval(x)",
        "exec(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_scan_finds(text):
    assert dangers(text)


def test_the_scan_leaves_alone():
    assert dangers("model.eval()\nnp.load(f, allow_pickle=False)\nre.compile('x')\ntorch.compile(f)") == []
