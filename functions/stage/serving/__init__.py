"""The stage as a function: its start, authentication, and the answers to each type of event.

May import: storage, storage.store, storage.checkpoints, storage.models, storage.loading, eventing, eventing.wire,
eventing.http, functions.configuration, functions.grammars, functions.hosting, functions.observing, functions.stage.engine,
functions.stage.kv, functions.stage.models.
"""
