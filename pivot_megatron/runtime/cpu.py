"""What megatron-core needs in order to run on CPU and gloo: every replacement, with its reason.

Installed once, before megatron-core is imported, and never where CUDA is available. Nothing else in the project knows of it.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
# Modules that make counters, norms and loss scales with a literal device="cuda".
_CUDA_LITERALS = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
)


class _Stream:
    """Stands for `torch.cuda.Stream`/`Event`: CPU work is in order, so waiting is already done. A class, because type
    expressions such as `torch.cuda.Stream | None` are evaluated when libraries are imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = record_event = synchronize = record = wait = _nothing

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _TorchOnCpu:
    """`torch` as one module sees it, with factories that take "cuda" for the CPU. torch itself stays as it is: other
    libraries recognise its factories by identity (meta-device contexts do)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def __init__(self) -> None:
        for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
            setattr(self, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[None]:
    yield


def install() -> None:
    """Replace the CUDA entry points that megatron-core calls unconditionally. Idempotent."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU stand-in must not be installed where CUDA is available")
    cuda: Any = torch.cuda
    if cuda.Stream is _Stream:
        return
    cuda.current_device = lambda: _CPU  # buffers, process-group tensors and rotary tables are placed "here"
    cuda.set_device = lambda *_: None
    cuda.synchronize = lambda *_, **__: None
    cuda.Stream = cuda.Event = _Stream  # gradient-reduce and p2p overlap create streams and events
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _Stream()
    cuda.stream = _stream_context
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None  # markers around attention's parts
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()  # the RNG tracker forks "the device's" generator
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    # Typed constructors, used as types (`isinstance`, dtype names) by the mixed-precision optimizer.
    cuda.FloatTensor, cuda.HalfTensor, cuda.BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment,return-value]
    plain_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The mixed-precision optimizer compares `param.type()` with the strings of the CUDA types.
        result = plain_type(self, *args, **kwargs)
        named = not args and not kwargs and isinstance(result, str) and "cuda" not in result
        return result.replace("torch.", "torch.cuda.", 1) if named else result

    tensor.type = cuda_type
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each module says once that neither TE nor apex is here; doctor says it better
        for name in _CUDA_LITERALS:
            importlib.import_module(name).torch = _TorchOnCpu()  # type: ignore[attr-defined]
    _patch_rng_tracker()
    _scale_in_place()
    _leave_lone_buffers()


def _scale_in_place() -> None:
    """Clipping scales gradients into themselves; the plain-torch stand-in for the fused kernel makes a copy of each first,
    which of a word embedding is a good part of all memory."""
    clip: Any = importlib.import_module("megatron.core.optimizer.clip_grads")

    def scale_in_place(chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], scale: float) -> None:
        for source, target in zip(*lists, strict=True):
            torch.mul(source, scale, out=target)

    clip.multi_tensor_scale_impl = scale_in_place


def _leave_lone_buffers() -> None:
    """A data-parallel group of one has nothing to exchange, and its part of a buffer is the buffer. gloo copies it all the
    same, and needs as much memory again as all gradients or all weights."""
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: torch.Tensor, given: torch.Tensor, *, group: Any, async_op: bool, **options: Any) -> Any:
            if group.size() == 1 and output.data_ptr() == given.data_ptr() and not async_op:
                return None
            return collective(output, given, group=group, async_op=async_op, **options)

        return call

    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)


def _patch_rng_tracker() -> None:
    """The tracker reads and sets `torch.cuda` generators by index; on CPU there is one generator."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def get_state(device: str = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    random._set_cuda_rng_state = set_state
    random._get_cuda_rng_state = get_state
