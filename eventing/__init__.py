"""CloudEvents of Lamina, their bytes, and their delivery over HTTP.

Tensors are bytes with a dtype and a shape. Neither torch nor Flask is imported. `wire` has the formats and `http` delivers the
events. `problems` has the reasons to refuse an event. `claim_check` moves payloads that are too large for an intermediary into
the object store.

May import: storage, storage.store, eventing.wire.
"""
