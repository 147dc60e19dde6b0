"""A pool of threads that grows with the number of calls and shrinks when calls have ended.

May import: nothing of Lamina.
"""
