"""What a preparation did: for a script as JSON, for a person as a few lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from pivot_megatron.data_prep.survey import Survey


def as_record(survey: Survey, rows: int, shards: int, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rows`: of the whole source; `read` is less where a count was reached before its end."""
    return {
        "rows": rows,
        "read": len(survey.kept),
        "kept": survey.count,
        "shards": shards,
        "dropped": {reason: vars(dropped) for reason, dropped in sorted(survey.dropped.items())},
        "images_changed": dict(sorted(survey.changes.items())),
        "settings": settings,
    }


def as_lines(record: Mapping[str, Any], notes: Mapping[str, str]) -> Sequence[str]:
    """`notes`: what to say of a reason beside its count."""
    lines = [
        f"read {record['read']:,} of {record['rows']:,} rows, kept {record['kept']:,}, shards: {record['shards']:,}"
    ]
    for reason, dropped in sorted(record["dropped"].items(), key=lambda item: -item[1]["count"]):
        note = f" ({notes[reason]})" if reason in notes else ""
        more = ", …" if dropped["count"] > len(dropped["first"]) else ""
        lines.append(f"  dropped {dropped['count']:,} {reason}{note}: {', '.join(dropped['first'])}{more}")
        lines.append(f"    the first: {dropped['example']}")
    changes = ", ".join(f"{count:,} {change}" for change, count in record["images_changed"].items())
    return [*lines, f"  images made plain: {changes}"] if changes else lines
