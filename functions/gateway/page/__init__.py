"""The page at `/`, and the stream of the pipeline's state that it draws.

May import: eventing, eventing.http, functions.fairness, functions.gateway.answers, functions.gateway.scheduling.
"""
