"""`python -m fastdraft` is the command `fastdraft`."""

import sys

from fastdraft.cli import main

sys.exit(main())
