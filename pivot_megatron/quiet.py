"""What libraries say about themselves, kept off the terminal; `--debug` lets it through."""

from __future__ import annotations

import logging
import os
import warnings

_NOISY_LOGGERS = ("megatron", "torch.distributed", "transformers")


def quiet() -> None:
    """Before torch, transformers and megatron-core are imported: no deprecation warnings, notices or progress bars of theirs.

    None of them says anything that a user of this program could act on; `pivot doctor` lists what is missing. Errors still
    raise. Child processes inherit the environment, and call this themselves for the rest.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns at every fork after its first use
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore")
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
