"""``python -m attnsr`` is the command ``basicsr``."""

import sys

from attnsr.cli import main

if __name__ == '__main__':
    sys.exit(main())
