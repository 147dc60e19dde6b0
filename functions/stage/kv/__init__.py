"""The tiers: places outside a stage's own memory that may hold the KV of a sequence. They are peers and the store.

KV that no tier holds is computed, so answers never depend on tiers.

May import: storage, storage.kv, storage.store, eventing, eventing.http, eventing.wire, functions.configuration,
functions.stage.engine, functions.stage.models, functions.threads.
"""
