"""Hugging Face folders into a checkpoint: `pivot convert import` for those who look for a script."""

import sys

from pivot_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "import", *sys.argv[1:]]))
