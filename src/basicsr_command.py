"""What the command ``basicsr`` starts: outside the package, whose import takes seconds, so that Ctrl-C is answered."""

import os
import signal


def main() -> int:
    """Run :func:`attnsr.cli.main`."""
    before = signal.signal(signal.SIGINT, _end)
    from attnsr.cli import main

    signal.signal(signal.SIGINT, before)
    return main()


def _end(*_: object) -> None:
    """At once, as nothing is begun yet; some libraries go on with their import where KeyboardInterrupt is raised."""
    os.write(2, b'interrupted\n')
    os._exit(130)
