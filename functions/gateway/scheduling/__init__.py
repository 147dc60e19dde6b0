"""Decides which sequences share a step, when the step starts, and what follows a failure (docs/scheduling.md).

May import: eventing, eventing.wire, functions.fairness, functions.observing, functions.threads, functions.gateway.stages.
"""
