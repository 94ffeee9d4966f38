"""What works on this machine's GPU, and how fast: one command, one table; see docs/gpu.md.

python tools/gpu_check.py [--out DIR] [--only PART]... [--list]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `tests`, and the project where it is not installed

from tests.gpu.check import main

if __name__ == "__main__":
    sys.exit(main())
