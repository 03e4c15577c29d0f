"""
Stores for agent frameworks, one module and one extra for each. None of them is imported by `import chatdb`.

An adapter uses only chatdb's public functions and the mappings in `chatdb/formats/`, which the imports use as well: so
an item that an adapter stored equals one that `chatdb import` brought.
"""
