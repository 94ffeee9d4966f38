"""The machine: devices, process groups, layer classes.

Importing this package prepares megatron-core for a machine without CUDA, so every package that imports `megatron.core`
imports this one first (in its `__init__`). Where CUDA is available nothing stands in for it, but a Transformer Engine that
does not load is kept out of its sight; an Adam whose state can be loaded is put in where neither Transformer Engine nor apex
brings one.
"""

import importlib.util

import torch

# `pivot doctor` must be able to say that megatron-core is missing.
if importlib.util.find_spec("megatron") is not None:
    if not torch.cuda.is_available():
        from pivot_megatron.runtime import cpu

        cpu.install()
    else:
        from pivot_megatron.runtime.engine import engine_fault

        engine_fault()
    from pivot_megatron.runtime import adam

    adam.install()
