"""What travels: events, their bytes, and how they are delivered. Holds bytes, dtypes and shapes; imports no torch, no Flask.

`wire` is the contract, `http` carries it. Here: `problems` (what goes wrong with an event as a whole) and `claim_check`
(payloads too large for an intermediary).

May import: storage, storage.store, eventing.wire.
"""
