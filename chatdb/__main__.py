"""Run the command line: `python -m chatdb`."""

from _chatdb_entry import main

main()
