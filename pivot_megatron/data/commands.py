"""`pivot data inspect`: what it prints, and the sheet it writes."""

from __future__ import annotations

from pathlib import Path

from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data.contact_sheet import require_sheet, write_sheet
from pivot_megatron.data.inspect import drawn, gather, spread
from pivot_megatron.data.inspect_text import facts_text, samples_text
from pivot_megatron.data.shards import open_shards
from pivot_megatron.errors import UserError

_ON_A_TERMINAL = 3
_ON_A_SHEET = 24


def inspect_shards(
    folder: str | Path,
    samples: int | None = None,
    seed: int | None = None,
    sheet: Path | None = None,
    tokenizer: Path | None = None,
    as_json: bool = False,
) -> str:
    """The facts of a folder of shards, here or behind a URL, and `samples` of its samples: below them, or on a page that is
    written to `sheet`.

    Without a `seed` the samples are the first, on a sheet some at even distances. `tokenizer` is a Hugging Face folder, for
    lengths in tokens too. `as_json` gives the facts alone. Raises UserError, before anything is read where that is possible.
    """
    if samples is not None and samples < 0:
        raise UserError(f"--samples: expected 0 or more, found {samples}")
    if sheet is not None:
        require_sheet(sheet)
    reader = open_shards(folder)
    facts = gather(reader, None if tokenizer is None else load_tokenizer(tokenizer))
    told = facts.as_json() if as_json else facts_text(facts)
    if sheet is not None:
        most = _ON_A_SHEET if samples is None else samples
        positions = spread(len(reader), most) if seed is None else drawn(len(reader), most, seed)
        write_sheet(sheet, facts, reader, positions)
        return told if as_json else f"{told}\n\n{len(positions)} of them on {sheet}"
    most = min(len(reader), _ON_A_TERMINAL if samples is None else samples)
    if as_json or not most:
        return told
    positions, title = (range(most), "first") if seed is None else (drawn(len(reader), most, seed), "drawn")
    return f"{told}\n\n{samples_text(reader, positions, f'{title} {most}' if most > 1 else title)}"
