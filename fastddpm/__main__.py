"""``python -m fastddpm`` is the ``fastddpm`` command."""

import sys

from fastddpm.cli import main

sys.exit(main())
