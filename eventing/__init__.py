"""Events, their bytes, and their delivery over HTTP. Tensors are bytes with dtype and shape; imports neither torch nor Flask.

`wire` has the formats, `http` delivers them, `problems` has the reasons to refuse an event, and `claim_check` moves payloads
that are too large for an intermediary into the store.

May import: storage, storage.store, eventing.wire.
"""
