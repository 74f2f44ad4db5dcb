"""``python -m sleb_serve.cli``, for launchers."""

import sys

from sleb_serve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
