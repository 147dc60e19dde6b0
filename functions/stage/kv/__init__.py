"""The tiers, places besides a stage's own memory that may hold a sequence's KV: peers and the store.

What no tier holds is computed, so answers never depend on tiers.

May import: storage, storage.kv, storage.store, eventing, eventing.http, eventing.wire, functions.configuration,
functions.stage.engine, functions.stage.models, functions.threads.
"""
