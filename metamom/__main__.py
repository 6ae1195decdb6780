"""``python -m metamom`` is the ``metamom`` command."""

import sys

from metamom.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
