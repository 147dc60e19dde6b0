"""Events, their bytes, and their delivery over HTTP. Holds bytes, dtypes and shapes; imports neither torch nor Flask.

`wire` has the formats, `http` delivers them, `problems` has the reasons to refuse an event, and `claim_check` keeps payloads in
the store that are too large for an intermediary.

May import: storage, storage.store, eventing.wire.
"""
