"""A pool of threads that grows with its work and shrinks when the work is done.

May import: nothing of Lamina.
"""
