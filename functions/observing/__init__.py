"""Logs, metrics and traces of stages and gateways.

May import: nothing of Lamina.
"""
