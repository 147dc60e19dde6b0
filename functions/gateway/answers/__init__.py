"""Code that all APIs of the gateway share: it sends prompts to the scheduler and makes answers from the tokens.

API keys, limits of clients, pages of other sites, the access log and the metrics of answers are here, too.

May import: eventing, eventing.wire, eventing.http, functions.configuration, functions.hosting, functions.observing,
functions.threads, functions.gateway.text, functions.gateway.scheduling, storage,
storage.models, storage.store.
"""
