"""What all APIs of the gateway share: prompts go to the scheduler, tokens become answers; keys, limits, access log, metrics.

May import: eventing, eventing.wire, eventing.http, functions.configuration, functions.hosting, functions.observing,
functions.gateway.text, functions.gateway.scheduling.
"""
