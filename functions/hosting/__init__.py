"""What makes a process of a function: the server, its start, and what the Flask applications share.

May import: eventing, eventing.wire, storage, storage.models, functions.configuration, functions.threads.
"""
