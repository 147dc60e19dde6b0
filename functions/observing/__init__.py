"""Logs, metrics and traces.

May import: nothing of Lamina.
"""
