"""Events over HTTP: the CloudEvents binding, connections that are kept, one request and its reply, server-sent events.

May import: eventing, eventing.wire.
"""
