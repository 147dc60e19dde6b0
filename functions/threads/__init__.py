"""A pool of threads that grows with the number of calls and shrinks when they are done.

May import: nothing of Lamina.
"""
