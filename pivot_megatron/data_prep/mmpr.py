"""MMPR v1.1 and v1.2: preference pairs in subsets that `meta.json` lists, and the selection of them that PIVOT trains on."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from pivot_megatron.data.sample import BadSample
from pivot_megatron.data.tokens import Tokenizer
from pivot_megatron.data_prep.rows import Row, image_path, key_names, require_folder, row_key, single_image
from pivot_megatron.data_prep.tables import json_line
from pivot_megatron.errors import UserError

_FIELDS = ("question", "chosen", "rejected")


@dataclass(frozen=True)
class Subset:
    """`repeat`: how often its rows are taken; of a part of one time, the first rows, as InternVL takes them."""

    name: str
    annotation: Path
    images: Path
    repeat: float = 1.0


class MmprRows:
    """All single-image and text-only pairs, shuffled; before them, what was refused without being shuffled.

    The annotations are read once for the places of their lines; the pairs are then read one by one, so that three
    million of them need not fit in memory. Raises UserError.
    """

    def __init__(self, subsets: Sequence[Subset], seed: int) -> None:
        self._subsets = subsets
        self._names = key_names(subset.name for subset in subsets)
        self._refused: list[BadSample] = []
        lines = np.concatenate([self._scan(number) for number in range(len(subsets))])
        # What a shuffle does depends on the length alone, so places are shuffled as a list of rows would be.
        order = list(range(len(lines)))
        Random(seed).shuffle(order)
        self._lines = lines[order]

    def __len__(self) -> int:
        return len(self._refused) + len(self._lines)

    @property
    def files(self) -> Sequence[Path]:
        return [subset.annotation for subset in self._subsets]

    def __iter__(self) -> Iterator[Row | BadSample]:
        yield from self._refused
        with ExitStack() as stack:
            files = [stack.enter_context(subset.annotation.open("rb")) for subset in self._subsets]
            for number, position, copy, offset in self._lines:
                files[number].seek(offset)
                yield self._row(number, row_key(self._names[number], position, copy), files[number].readline())

    def _scan(self, number: int) -> npt.NDArray[np.int64]:
        """`[rows, 4]`: subset, position, copy and byte offset of the rows that are shuffled."""
        subset = self._subsets[number]
        offsets: list[int] = []
        wanted: list[bool] = []
        if subset.repeat:
            offset = 0
            with subset.annotation.open("rb") as file:
                for line in file:
                    if line.strip():
                        wanted.append(not self._refuses(number, len(offsets), line))
                        offsets.append(offset)
                    offset += len(line)
        copies = [np.empty((0, 4), np.int64)]
        for copy in range(math.ceil(subset.repeat)):
            rows = int(len(offsets) * min(1.0, subset.repeat - copy))
            positions = np.flatnonzero(wanted[:rows])
            places = np.array(offsets, np.int64)[positions]
            copies.append(np.stack([np.full_like(places, number), positions, np.full_like(places, copy), places], 1))
        return np.concatenate(copies)

    def _refuses(self, number: int, position: int, line: bytes) -> bool:
        key = row_key(self._names[number], position)
        row = json_line(line)
        if not isinstance(row, dict):
            self._refused.append(BadSample(key, "bad_json", f"expected an object, found {str(row)[:80]!r}"))
            return True
        try:
            single_image(key, row.get("image"))
        except BadSample as refusal:
            self._refused.append(refusal)
            return True
        return False

    def _row(self, number: int, key: str, line: bytes) -> Row | BadSample:
        row = json.loads(line)
        image = single_image(key, row.get("image"))
        record = {name: row[name] for name in _FIELDS if name in row} | {"subset": self._subsets[number].name}
        try:
            if image is not None and not isinstance(image, str):
                raise BadSample(key, "bad_image_field", f"expected a path in 'image', found {type(image).__name__}")
            return Row(key, record, None if image is None else image_path(key, self._subsets[number].images, image))
        except BadSample as refusal:
            return refusal


@dataclass(frozen=True)
class PairLength:
    """No more than `most` tokens: those of question and answer written one after the other, without a chat template.

    The paper counts the chosen answer alone; a rejected one that is longer would be cut in training, so it is counted too.
    """

    tokenizer: Tokenizer
    most: int

    def __call__(self, row: Row) -> None:
        """Raises BadSample `chosen_too_long` or `rejected_too_long`."""
        question, *answers = (row.record[name] for name in _FIELDS)
        for name, answer in zip(_FIELDS[1:], answers, strict=True):
            tokens = len(self.tokenizer.encode(question + answer, add_special_tokens=False))
            if tokens > self.most:
                raise BadSample(row.key, f"{name}_too_long", f"question and {name} take {tokens} tokens of {self.most}")


def as_conversation(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The pair as SFT sees it: the question and its chosen answer."""
    turns = [{"from": "human", "value": record["question"]}, {"from": "gpt", "value": record["chosen"]}]
    return {"conversations": turns, **{name: value for name, value in record.items() if name not in _FIELDS}}


def find_subsets(path: Path, images: Path | None) -> Sequence[Subset]:
    """Of MMPR's folder, its `meta.json`, or one annotation file, to which `images` belongs. Raises UserError."""
    if path.is_dir():
        path = path / "meta.json"
    if not path.is_file():
        raise UserError(f"expected MMPR's meta.json or an annotation's jsonl at {path}, found none: check the path")
    if path.suffix == ".jsonl":
        if images is None:
            raise UserError(f"{path}: expected --images, the folder its image paths start from, found none")
        return [Subset(path.stem, path, require_folder(images, "--images"))]
    if images is not None:
        raise UserError(f"--images: {path} says where each subset's images are; leave it out")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected JSON in {path}, found something else ({error}): fetch it again") from error
    if not isinstance(meta, dict) or not meta:
        raise UserError(f"expected subsets by name in {path}, found {type(meta).__name__}: fetch it again")
    return [_subset(path, name, row) for name, row in meta.items()]


def _subset(meta: Path, name: str, row: Any) -> Subset:
    where = f"{meta}: {name}"
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("root", "annotation")):
        raise UserError(f"{where}: expected the paths root and annotation, found {row!r}")
    repeat = row.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 <= repeat <= 1000:
        raise UserError(f"{where}.repeat_time: expected a number from 0 to 1000, found {repeat!r}")
    annotation = meta.parent / row["annotation"]
    if not annotation.is_file():
        raise UserError(f"{where}.annotation: expected a jsonl at {annotation}, found none: fetch it, or its line goes")
    return Subset(name, annotation, meta.parent / row["root"], float(repeat))
