"""`python -m tools.gpu_check`."""

import sys

from .cli import main

sys.exit(main())
