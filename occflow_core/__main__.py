"""`python -m occflow_core SUB` is `occflow SUB`."""

import sys

from .cli import main

sys.exit(main())
