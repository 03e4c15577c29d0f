"""
Console script `chatdb`: an interrupt at any moment prints one line and exits with status 130.

Outside the package, because importing the package alone takes a third of a second.
"""

import os
import signal


def main() -> None:
    """Import and run the command line."""
    from chatdb.cli.app import main as run

    run()


def _end(*_: object) -> None:
    """Exit at once: nothing needs cleanup yet, and a KeyboardInterrupt during an import can get lost."""
    try:
        os.write(2, b"chatdb: interrupted\n")
    finally:
        os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # keep an ignored SIGINT ignored
    signal.signal(signal.SIGINT, _end)
