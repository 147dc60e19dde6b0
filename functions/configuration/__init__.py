"""What a function is told by its environment: every key, its parser and its default, read once at the start.

May import: eventing.wire, storage.store.
"""
