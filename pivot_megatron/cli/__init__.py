"""The one entry point: `pivot VERB`. Parses, calls, prints. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from pivot_megatron.cli import bench, checkpoint, convert, data, plan, probe, recipe, runs
from pivot_megatron.cli.verbs import new_parser
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.quiet import quiet


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while running, 2 the input or config is wrong, 3 ended by a rule of the run."""
    args = _parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders only: a name that is no folder must not become a download
    if not args.debug:
        quiet()
    try:
        return int(args.run(args) or 0)
    except (UserError, RunError) as error:
        if args.debug:
            raise
        for line in str(error).splitlines():
            print(f"pivot: {line}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        from pivot_megatron.runtime.distributed import peer_was_lost

        if args.debug or not peer_was_lost(error):
            raise
        print("pivot: another process of this run ended; its own message says why", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if args.debug:
            raise
        print(f"pivot: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        return 2 if error.errno in _USERS else 1
    except KeyboardInterrupt:
        print("pivot: interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 1


# What a user can mend: a missing file, one where a folder should be, a full or read-only disk. Others, such as a file server
# that does not answer, may be gone at the next try.
_USERS = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand on either side of options, which argparse alone does not allow."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all("=" in text and not text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser, verb, verbs = new_parser()
    recipe.add(verb)
    runs.add(verb)
    plan.add(verb)
    for group in (convert, checkpoint, data, probe, bench):
        group.add(verb, verbs)
    return parser


def entry() -> None:
    sys.exit(main())
