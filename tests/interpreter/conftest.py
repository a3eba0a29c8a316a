"""Triton kernels in Triton's interpreter, which has to be switched on before the first kernel is imported."""

from __future__ import annotations

import torch

from tickwork_kernels.support import has_triton, interpreting

collect_ignore_glob = [] if interpreting() and has_triton() else ["test_*.py"]
torch.set_num_threads(1)
