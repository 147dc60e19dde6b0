"""Computes a stage's events: their queue, forward passes that merge them, checks and admission of rows, and sampling.

Several threads may bring events, but a lock lets only one compute at a time.

May import: eventing, eventing.wire, functions.grammars, functions.stage.models, functions.stage.native, functions.threads,
storage, storage.loading, storage.models.
"""
