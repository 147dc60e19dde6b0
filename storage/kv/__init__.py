"""Keys and values of sequences as objects: named by content, sealed, removed by age and bytes.

May import: storage, storage.store.
"""
