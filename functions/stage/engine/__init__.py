"""Computes a stage's events: queues them, checks and admits their rows, merges them into forward passes, samples tokens.

Several threads may submit events, but a lock lets only one thread compute at a time.

May import: eventing, eventing.wire, functions.grammars, functions.stage.models, functions.stage.native, functions.threads,
storage, storage.loading, storage.models.
"""
