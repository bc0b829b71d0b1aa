"""Makes this folder importable, so that tests in its sub-folders share their helpers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
