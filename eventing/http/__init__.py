"""Events over HTTP: the CloudEvents binding, framing of a hop, delivery over kept connections, server-sent events.

May import: eventing, eventing.wire.
"""
