"""The tiers of keys and values besides a stage's memory: peers and the store. A right answer never needs one.

May import: storage, storage.kv, storage.store, eventing, eventing.http, eventing.wire, functions.configuration,
functions.stage.engine, functions.stage.models, functions.threads.
"""
