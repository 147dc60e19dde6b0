"""Which sequences go round the stages together, when, and what is done when something breaks (docs/scheduling.md).

May import: eventing, eventing.wire, functions.observing, functions.threads, functions.gateway.stages.
"""
