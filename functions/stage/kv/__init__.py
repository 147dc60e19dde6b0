"""Keys and values from pod to pod, and into the store and back: the tiers behind a stage's memory. None is ever needed.

May import: storage, storage.kv, storage.store, eventing, eventing.http, eventing.wire, functions.configuration,
functions.stage.engine, functions.stage.models, functions.threads.
"""
