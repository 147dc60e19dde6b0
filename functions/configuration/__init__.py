"""The configuration of functions: every key of the environment with its parser and default, read once at the start.

May import: eventing.http, eventing.wire, storage.store.
"""
