"""`python train.py vae|energy ...`: the command of `vaebm_fast.cli.train`."""

import sys

from vaebm_fast.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
