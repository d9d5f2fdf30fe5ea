"""`python -m tools.compile_kernels`."""

import sys

from .cli import main

sys.exit(main())
