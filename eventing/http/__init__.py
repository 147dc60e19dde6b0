"""Events over HTTP: the CloudEvents binding, delivery over kept-alive connections, server-sent events.

Also checks the addresses of pods, sets up TLS between pods, and parses the targets of requests.

May import: eventing, eventing.wire.
"""
