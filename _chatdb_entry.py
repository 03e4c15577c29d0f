"""
The console script `chatdb`, of which an interrupt ends each moment with status 130 and one line.

It stands outside the package, because importing that takes a third of a second already.
"""

import os
import signal


def main() -> None:
    """Import the command line and run it."""
    from chatdb.cli.app import main as run

    run()


def _end(*_: object) -> None:
    """End at once: nothing has begun, and KeyboardInterrupt during an import can be lost or turned into an error."""
    try:
        os.write(2, b"chatdb: interrupted\n")
    finally:
        os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
    signal.signal(signal.SIGINT, _end)
