"""Loads a stage's layers from the store, or from a cache on the node, into memory, and verifies them.

May import: storage, storage.models, storage.store.
"""
