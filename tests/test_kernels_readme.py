"""The kernels' README, run as it stands, and the package's independence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.DOTALL)
# Imports of anything but torch, triton, what they need, and the package itself fail.
ALONE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tickwork", "trio", "attrs", "attr", "transformers", "safetensors", "rich", "click"}:
            raise ImportError(name + " is not part of the kernels' world")
sys.meta_path.insert(0, Refuse())
import tickwork_kernels
from tickwork_kernels import check
sys.exit(check.main(["--only", "losses", "--impl", "ppo"]))
"""


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the interpreter as a user would, with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(cwd), str(ROOT / "kernels")])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=env)


def test_the_example_runs() -> None:
    """The first example ends well and says which implementation it took."""
    answer = python("-c", BLOCKS[0])
    assert answer.returncode == 0, answer.stderr
    assert "preferred" in answer.stdout


def test_the_plugin_conforms(tmp_path: Path) -> None:
    """The loss and the head of the README, registered from outside, pass the suite by their names."""
    (tmp_path / "plugin.py").write_text(BLOCKS[1])
    names = ["--impl", "clipped", "--impl", "naive-toy"]
    command = ["-m", "tickwork_kernels.check", "--plugin", "plugin", "--only", "losses", "--only", "head", *names]
    answer = python(*command, cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert re.search(r"^losses clipped: 5 checks", answer.stdout, re.MULTILINE)
    assert re.search(r"^head naive-toy: \d+ checks", answer.stdout, re.MULTILINE)
    assert "0 failed" in answer.stdout


def test_a_wrong_plugin_is_found_out(tmp_path: Path) -> None:
    """The same head without its temperature fails, and so does the loss with a wrong derivative."""
    wrong = BLOCKS[1].replace("logits / rows.temperature[:, None]", "logits").replace(" * inside", "")
    assert wrong.count("inside") == 1
    (tmp_path / "plugin.py").write_text(wrong)
    names = ["--impl", "clipped", "--impl", "naive-toy"]
    command = ["-m", "tickwork_kernels.check", "--plugin", "plugin", "--only", "losses", "--only", "head", *names]
    answer = python(*command, cwd=tmp_path)
    assert answer.returncode >= 2
    assert "head naive-toy: budget: temperature: FAILED" in answer.stdout
    assert "losses clipped: the derivative is autograds: FAILED" in answer.stdout


def test_the_kernels_stand_alone() -> None:
    """The package and its suite need torch and triton, nothing else."""
    answer = python("-c", ALONE)
    assert answer.returncode == 0, answer.stdout + answer.stderr
