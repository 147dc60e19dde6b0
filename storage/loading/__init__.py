"""A stage's layers out of the store into memory, verified, or out of a cache on the node.

May import: storage, storage.models.
"""
