"""CITATION.cff against what the Citation File Format 1.2.0 asks of every file (its schema's `required`)."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_it_says_whom_to_cite() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"] == "PIVOT-Megatron"
    assert cited["license"] == "Apache-2.0" and cited["type"] == "software"
    assert "version" not in cited  # which stands in pivot_megatron/__init__.py alone
    (paper,) = cited["references"]
    assert paper["title"] == "RL Makes MLLMs See Better Than SFT" and paper["url"].endswith("2510.16333")
    for work in (cited, paper):
        assert work["type"] and all(author["name"] for author in work["authors"])
