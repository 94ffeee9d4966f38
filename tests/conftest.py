from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def workers() -> Iterator[object]:
    from tests.harness import Workers

    pool = Workers()
    yield pool
    pool.close()
