"""Published models: their layout in a bucket, the manifest, and the publisher that writes both.

May import: storage, storage.store, storage.checkpoints.
"""
