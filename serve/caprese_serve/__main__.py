"""`python -m caprese_serve` is the `caprese` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.argv[0] = "caprese"  # the name in a result's provenance
    main()
