"""``python -m fastddpm`` is the ``fastddpm`` command."""

import sys

from fastddpm.cli import main

# A benchmark's spawned process imports this module again.
if __name__ == "__main__":
    sys.exit(main())
