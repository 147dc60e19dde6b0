"""Runs a function as a process: the HTTP server, the start-up, and code that the Flask applications share.

May import: eventing, eventing.http, eventing.wire, storage, storage.models, functions.configuration, functions.fairness,
functions.threads.
"""
