"""The S3-compatible store: objects, ranged reads, signatures, and an embedded server for one machine.

May import: storage.
"""
