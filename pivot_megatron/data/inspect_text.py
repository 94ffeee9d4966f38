"""The facts of a folder of shards, and some of its samples, as lines for a terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from pivot_megatron.data.histogram import Measure, value_label
from pivot_megatron.data.inspect import Facts, image_head, images_of, texts_of
from pivot_megatron.data.sample import BadSample
from pivot_megatron.data.shards import ShardReader

_LINE = 100
_WIDTH = 80
_EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"
# What moves the cursor, or has no encoding: control characters, and halves of surrogate pairs in the names of files.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def facts_text(facts: Facts) -> str:
    """Counts, kinds, images and lengths, and histograms of what was measured."""
    lines = [*_counts(facts), *_table(facts.measures), *_histograms(facts.measures)]
    return "\n".join(lines)


def samples_text(reader: ShardReader, positions: Sequence[int], title: str) -> str:
    """The samples at `positions`, each text cut to one line. Empty without any."""
    if not positions:
        return ""
    return "\n".join([f"{title}:", *(line for position in positions for line in _row(reader, position))])


def plural(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _counts(facts: Facts) -> Iterator[str]:
    size = f"{facts.bytes / 2**20:.1f} MiB"
    yield f"{_line(facts.folder)}: {plural(facts.samples, 'sample')} in {plural(facts.tars, 'tar')}, {size}"
    if facts.looked_at < facts.samples:
        yield f"looked at {facts.looked_at:,} of them, spread evenly"
    yield f"kinds: {', '.join(f'{n:,} {kind}' for kind, n in facts.kinds.items()) or 'none'}"
    if facts.broken:
        reasons = ", ".join(f"{broken.count:,} {reason}" for reason, broken in facts.broken.items())
        yield f"broken: {reasons}; a run stops at the first of them"
    count = sum(facts.kinds.values())
    if count:
        yield f"with an image: {facts.with_image:,} of {count:,} ({facts.with_image / count:.0%})"
    if facts.first_images:
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(facts.first_images).most_common())
        yield f"first {plural(len(facts.first_images), 'image')}: {kinds}"


def _table(measures: Sequence[Measure]) -> Iterator[str]:
    for unit, group in groupby(measures, key=lambda measure: measure.unit):
        yield f"{unit:<14}{'min':>8}{'median':>8}{'max':>8}"
        for found in group:
            values = (found.least, found.median, found.most)
            yield f"  {found.name:<12}" + "".join(f"{value_label(value):>8}" for value in values)


def _histograms(measures: Sequence[Measure]) -> Iterator[str]:
    """For each unit a line a bin, and a column of counts and bars a field, each column's longest bar as long as it may be."""
    for unit, grouped in groupby(measures, key=lambda measure: measure.unit):
        group = list(grouped)
        labels = group[0].labels
        first = max(len(unit), *(2 + len(label) for label in labels)) + 2
        digits = max(len(f"{max(found.counts):,}") for found in group)
        bar = min(24, (_WIDTH - first) // len(group) - digits - 3)
        widest = max(bar, *(len(found.name) - digits for found in group))
        yield ""
        yield (f"{unit:<{first}}" + "".join(f"{found.name:<{digits + widest + 3}}" for found in group)).rstrip()
        for index, label in enumerate(labels):
            cells = (f"{f.counts[index]:>{digits},} {_bar(f, index, bar):<{widest + 2}}" for f in group)
            yield (f"  {label:<{first - 2}}" + "".join(cells)).rstrip()


def _bar(found: Measure, index: int, width: int) -> str:
    count = found.counts[index]
    if not count:
        return ""
    full, eighth = divmod(max(1, round(count / max(found.counts) * width * 8)), 8)
    return _EIGHTHS[-1] * full + _EIGHTHS[eighth].strip()


def _row(reader: ShardReader, position: int) -> Iterator[str]:
    try:
        sample = reader.read(position)
    except BadSample as error:
        yield f"  {_line(str(error))}"
        return
    heads = [str(image_head(image) or "unreadable") for image in images_of(sample)]
    yield f"  {_line(sample.key)}  {' and rejected '.join(heads) or 'text only'}"
    for name, text in texts_of(sample):
        # Cut twice: what is cut off is not worth spelling out.
        line = _line(text[: _LINE + 1])
        yield f"    {name}: {line if len(line) <= _LINE else line[: _LINE - 3] + '...'}"


def _line(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)
