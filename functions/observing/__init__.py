"""Logs, metrics and traces of both roles.

May import: nothing of Lamina.
"""
