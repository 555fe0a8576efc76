"""A page on which reference images steer a model: python app.py [--ckpt PATH ...]."""

import sys
from collections.abc import Sequence

from ilvr_lightning.app.arguments import parse_arguments
from ilvr_lightning.runtime.command import command, say


@command  # a mistake is one line and status 2; nothing up to here imports torch
def main(argv: Sequence[str]) -> int:
    """Run the command until Control-C; returns the exit status."""
    args = parse_arguments(argv)
    say("loading ...")
    from ilvr_lightning.app.server import end_by_signal, serve, temporary_folder

    end_by_signal()
    with temporary_folder() as folder:
        serve(args, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
