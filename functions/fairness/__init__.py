"""The policy by which clients share a resource that is full; all parts of Lamina use this one.

May import: nothing of Lamina.
"""
