"""Computes events on one thread at a time: a queue, passes that merge events, checks and admission of rows, sampling.

May import: eventing, eventing.wire, functions.grammars, functions.stage.models.
"""
