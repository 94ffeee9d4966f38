"""A checkpoint as a Hugging Face folder: `pivot convert export` for those who look for a script."""

import sys

from pivot_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "export", *sys.argv[1:]]))
