"""Files and batches of clients, kept in the object store and nowhere else, and the worker that answers batches.

May import: storage, storage.store, eventing.
"""
