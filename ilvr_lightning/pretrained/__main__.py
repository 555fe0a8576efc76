"""python -m ilvr_lightning.pretrained: the former name of python -m ilvr_lightning.checkpoints."""

import sys

from ilvr_lightning.checkpoints.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
