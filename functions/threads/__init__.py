"""Threads that wait for others: a pool that grows with what there is to do and shrinks when it is done.

May import: nothing of Lamina.
"""
