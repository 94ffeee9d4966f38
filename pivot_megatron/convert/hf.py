"""Hugging Face folders: `config.json` and safetensors, read slice by slice, written shard by shard."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pivot_megatron.checkpoints.folder import place_beside
from pivot_megatron.convert.plan import Slice
from pivot_megatron.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder at {path.parent}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{path}: not JSON ({error}); was the download cut off?") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


Spellings = Callable[[str], Sequence[str]]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_PICKLES = (".bin", ".pt", ".pth", ".tar", ".ckpt")
_PICKLE_HINT = (
    "; {0} is a pickle, which can run code as it is read: load it where you trust it with torch.load(..., weights_only=True), "
    "and write its tensors with safetensors.torch.save_file"
)

_CHUNK = re.compile(r"(.*)\[(\d+)/(\d+)\]")


def chunk_of(name: str) -> tuple[str, int, int]:
    """`x.weight[1/3]`, the second of three equal chunks of `x.weight`'s rows, as (`x.weight`, 1, 3); a whole tensor is
    (name, 0, 1)."""
    found = _CHUNK.fullmatch(name)
    return (found[1], int(found[2]), int(found[3])) if found else (name, 0, 1)


def with_chunks_joined(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they come, chunks of one, which come one after another, put together again."""
    for name, parts in itertools.groupby(tensors, key=lambda item: chunk_of(item[0])[0]):
        found = [tensor for _, tensor in parts]
        yield name, found[0] if len(found) == 1 else torch.cat(found)


class HfTensors:
    """Tensors of a Hugging Face folder by their hub names, whichever of the known spellings the folder's files have.

    `spellings`: names under which a tensor may stand in the folder, the likeliest first. A name may be of a chunk of a
    tensor, see `chunk_of`.
    """

    def __init__(self, folder: Path, spellings: Spellings = lambda name: [name]) -> None:
        self.folder = folder
        self._spellings = spellings
        self._file_of = self._list_files()
        self._open: dict[Path, Any] = {}

    def _list_files(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
                raise UserError(
                    f"{index}: expected a weight_map of tensors' names to files, found none; was the copy cut off?"
                )
            if missing := sorted({file for file in names.values() if not (self.folder / file).is_file()}):
                raise UserError(f"{index}: expected {missing[0]} beside it, found no such file; fetch it again")
            return {name: self.folder / file for name, file in names.items()}
        single = self.folder / WEIGHTS
        if not single.exists():
            pickles = (
                sorted(p.name for p in self.folder.iterdir() if p.suffix in _PICKLES) if self.folder.is_dir() else []
            )
            hint = _PICKLE_HINT.format(pickles[0]) if pickles else ""
            raise UserError(f"{self.folder}: expected {WEIGHTS} or {INDEX}, found neither{hint}")
        return dict.fromkeys(self._handle(single).keys(), single)

    def _handle(self, file: Path) -> Any:
        if not hasattr(self, "_open"):
            self._open = {}
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                if _is_pickle(file):
                    raise UserError(f"{file}: expected safetensors{_PICKLE_HINT.format(file.name)}") from None
                raise UserError(f"{file}: not a whole safetensors file ({error}); was the copy cut off?") from None
        return self._open[file]

    def has(self, name: str) -> bool:
        return any(chunk_of(spelling)[0] in self._file_of for spelling in self._spellings(name))

    def stored_name(self, name: str) -> str:
        """The name under which the folder holds `name`; raises UserError if it holds it under none."""
        for spelling in self._spellings(name):
            if chunk_of(spelling)[0] in self._file_of:
                return spelling
        raise UserError(
            f"{self.folder}: expected a tensor {name}, found none; is this the checkpoint that config.json says?"
        )

    @property
    def where(self) -> str:
        return str(self.folder)

    def _slice(self, stored: str) -> Any:
        file = self._file_of[stored]
        try:
            return self._handle(file).get_slice(stored)
        except SafetensorError as error:
            raise UserError(
                f"{file}: expected {stored}, as {INDEX} says, found none ({error}); fetch it again"
            ) from None

    def holding(self, parts: Iterable[str]) -> set[str]:
        """The folder's own names of the tensors that `parts` are, or are chunks of."""
        return {chunk_of(self.stored_name(part))[0] for part in parts}

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, _, chunks = chunk_of(self.stored_name(name))
        rows, *rest = self._slice(stored).get_shape() or (1,)
        return (rows // chunks, *rest)

    def dtype(self, name: str) -> torch.dtype:
        stored = chunk_of(self.stored_name(name))[0]
        kind = self._slice(stored).get_dtype()
        if kind not in _DTYPES:
            raise UserError(f"{self.folder}: {stored}: expected one of {', '.join(_DTYPES)}, found {kind}")
        return _DTYPES[kind]

    def widest_dtype(self) -> torch.dtype:
        """In which every tensor of the folder that is of numbers with a point keeps all its bits."""
        kinds = {self._slice(stored).get_dtype() for stored in self._file_of}
        return reduce(torch.promote_types, (_DTYPES[kind] for kind in sorted(kinds & _DTYPES.keys())))

    def release(self) -> None:
        """Close every file: what was read of them no longer counts as this process's memory."""
        self._open.clear()

    def read(self, name: str, part: Slice | None = None) -> Tensor:
        """The tensor, or only the bytes of its slice. The slice's zeros are not added."""
        stored, chunk, chunks = chunk_of(self.stored_name(name))
        if chunks == 1 and (part is None or part.dim is None):
            self._slice(stored)
            whole: Tensor = self._handle(self._file_of[stored]).get_tensor(stored)
            return whole
        rows = self.shape(name)[0]
        index = [slice(chunk * rows, (chunk + 1) * rows), *[slice(None)] * (part.dim if part and part.dim else 0)]
        if part is not None and part.dim is not None:
            first = chunk * rows if part.dim == 0 else 0
            index[part.dim] = slice(first + part.start, first + part.stop)
        cut: Tensor = self._slice(stored)[tuple(index)]
        return cut


def _is_pickle(file: Path) -> bool:
    """By its first bytes, whatever it is called: torch.save writes a zip, and wrote a bare pickle before."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))


SHARD_BYTES = 1 << 28
"""Of one safetensors file of several, and so the most that a folder's writing holds in memory, but for a larger tensor."""


def cannot_write(out: Path, error: BaseException) -> UserError:
    """By `out` alone: the files that an OSError names are those of the place beside it, or were only read."""
    reason = (isinstance(error, OSError) and error.strerror) or (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{out}: cannot write ({reason}); is the disk full?")


def copy_file(source: Path, target: Path) -> None:
    """One of the small files beside weights. Raises UserError if `source` cannot be read, and OSError for what is wrong with
    `target` alone."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: cannot read ({error.strerror})") from None
    target.write_bytes(content)


def write_folder(
    out: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    copied: Sequence[Path] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A Hugging Face folder, whole or not there at all: one safetensors file, or several and their index where tensors take
    more than `shard_bytes`.

    `copied`: files taken over unchanged. Raises UserError if `out` exists and is not empty, and where the disk refuses.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: already has files in it; export to a new folder")
    out = out.absolute()
    part = place_beside(out)
    try:
        part.mkdir(parents=True)
        _write_tensors(part, tensors, shard_bytes)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in copied:
            copy_file(file, part / file.name)
        if out.exists():
            out.rmdir()
        part.replace(out)
    except (OSError, SafetensorError) as error:
        raise cannot_write(out, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)  # there no more where all went well


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    files: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # before the next one is read
    if len(files) == 1:
        (folder / "0.safetensors").replace(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.safetensors").replace(folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard
