"""One thread that computes: events queue, a pass takes several, each row is admitted, run and answered by itself.

May import: eventing, eventing.wire, functions.grammars, functions.stage.models.
"""
