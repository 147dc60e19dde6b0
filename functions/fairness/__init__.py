"""The one policy by which clients share a resource that is full.

May import: nothing of Lamina.
"""
