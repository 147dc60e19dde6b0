"""The S3-compatible store: objects, ranged reads, signatures, and the server that comes along for one machine.

May import: storage.
"""
