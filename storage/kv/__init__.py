"""Keys and values of sequences as objects in the store: named by content, encrypted, deleted by age and total size.

May import: storage, storage.store.
"""
