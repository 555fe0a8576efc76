"""app.py's command line. No torch here."""

import argparse
from collections.abc import Sequence

from ilvr_lightning.runtime.command import Parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags by their names.

    Raises:
        UserError: a flag is unknown or lacks its value.
    """
    parser = Parser(
        prog="app.py",
        description="Open a page in the browser on which reference images steer a model (ILVR, Choi et al. 2021).",
        epilog="The port is 7860, or the next one that is free; the variable GRADIO_SERVER_PORT sets another.",
        allow_abbrev=False,
        stray="a checkpoint is given by --ckpt",
    )
    parser.add_argument("--ckpt", nargs="+", default=[], metavar="PATH",
        help="checkpoints to choose from, those of other programs too, or names of bundled models; default: the newest "
        "run's last checkpoint, and the bundled models")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="kind of device (%(default)s)")  # fmt: skip
    parser.add_argument("--server-name", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen on; with 0.0.0.0 other machines reach the page, too (%(default)s)")  # fmt: skip
    parser.add_argument("--share", action="store_true",
        help="also publish the page under an address of gradio.live: whoever knows it can use this machine to "
        "sample (off)")  # fmt: skip
    return parser.parse_args(list(argv))
