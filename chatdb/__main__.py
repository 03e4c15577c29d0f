"""Makes `python -m chatdb` the program `chatdb`."""

from _chatdb_entry import main

main()
