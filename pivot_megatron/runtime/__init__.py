"""The machine: devices, process groups, layer classes.

Importing this package prepares megatron-core for a machine without CUDA, so every package that imports `megatron.core`
imports this one first (in its `__init__`). Where CUDA is available nothing is replaced.
"""

import torch

if not torch.cuda.is_available():
    from pivot_megatron.runtime import cpu

    cpu.install()
