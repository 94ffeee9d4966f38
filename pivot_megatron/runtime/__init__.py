"""The machine: devices, process groups, layer classes.

Importing this package prepares megatron-core for a machine without CUDA, so every package that imports `megatron.core`
imports this one first (in its `__init__`). Where CUDA is available nothing is replaced.
"""

import importlib.util

import torch

# `pivot doctor` must be able to say that megatron-core is missing.
if not torch.cuda.is_available() and importlib.util.find_spec("megatron") is not None:
    from pivot_megatron.runtime import cpu

    cpu.install()
