"""Code that all APIs of the gateway share: sends prompts to the scheduler and makes answers from the tokens.

Also here: API keys, limits of clients, protection from pages of other sites, the access log, and the metrics of answers.

May import: eventing, eventing.wire, eventing.http, functions.configuration, functions.hosting, functions.observing,
functions.threads, functions.gateway.text, functions.gateway.scheduling, storage, storage.models, storage.store.
"""
