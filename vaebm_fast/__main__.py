"""`python -m vaebm_fast` is `vaebm-fast`."""

from vaebm_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
