"""The samples of a run: several folders of shards, one after another, and what of them makes an epoch."""

from __future__ import annotations

import bisect
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from pivot_megatron.config.schema import ShardCache
from pivot_megatron.data.sample import BadSample, Sample
from pivot_megatron.data.shards import ShardReader, open_shards
from pivot_megatron.errors import UserError


class PairSet:
    """Samples of several shard folders, one after another, by one index."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = readers
        self._ends = list(accumulate(map(len, readers)))

    @classmethod
    def open(cls, folders: Sequence[str | Path], cache: ShardCache | None = None) -> PairSet:
        readers = [open_shards(folder, cache) for folder in folders]
        if empty := [reader.where for reader in readers if not len(reader)]:
            raise UserError(f"data.shards: expected samples in {', '.join(empty)}, found none")
        return cls(readers)

    def by_folder(self) -> list[PairSet]:
        """The samples of each folder as a set of their own."""
        return [PairSet([reader]) for reader in self._readers]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(r.fingerprint for r in self._readers).encode()).hexdigest()

    @property
    def described(self) -> str:
        """What a run's order of samples follows from, a folder after another."""
        return ", ".join(f"{len(reader)} samples {reader.fingerprint[:16]}" for reader in self._readers)

    @property
    def beside(self) -> list[Path]:
        """Where files that are made from each folder's samples are kept."""
        return [reader.beside for reader in self._readers]

    @property
    def counts(self) -> list[int]:
        """Samples of each folder."""
        return [len(reader) for reader in self._readers]

    @property
    def known_bad(self) -> list[BadSample]:
        """The samples that the folders' indexes say are broken."""
        return [bad for reader in self._readers for bad in reader.known_bad]

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        which, at = self.place(index)
        return self._readers[which], at

    @property
    def keys(self) -> list[str]:
        return [key for reader in self._readers for key in reader.keys]

    def key(self, index: int) -> str:
        reader, at = self._locate(index)
        return reader.keys[at]

    def place(self, index: int) -> tuple[int, int]:
        """The folder's number and the sample's position in it."""
        which = bisect.bisect_right(self._ends, index)
        return which, index - (self._ends[which - 1] if which else 0)

    def read(self, index: int, images: bool = True) -> Sample:
        reader, at = self._locate(index)
        return reader.read(at, images)

    def warm(self, indices: Iterable[int]) -> None:
        """Get samples ready that will be read soon, for remote folders with a cache. Raises RunError."""
        wanted: dict[int, list[int]] = defaultdict(list)
        for index in indices:
            which, at = self.place(index)
            wanted[which].append(at)
        for which, positions in wanted.items():
            self._readers[which].warm(positions)

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """Width and height of a sample's images. Raises BadSample."""
        reader, at = self._locate(index)
        return reader.image_sizes(at)

    def image_names(self, index: int) -> list[int]:
        """Of a sample's images, what those of the same bytes have in common, 0 where it is not known. Raises BadSample."""
        reader, at = self._locate(index)
        return reader.image_names(at)
