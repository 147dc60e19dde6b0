"""The page at `/`, and the stream with the pipeline's state, which the page shows.

May import: eventing, eventing.http, functions.fairness, functions.gateway.answers, functions.gateway.scheduling.
"""
