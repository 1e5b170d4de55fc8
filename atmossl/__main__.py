"""`python -m atmossl` is the command `atmossl`."""

import sys

from atmossl.cli import main

sys.exit(main())
