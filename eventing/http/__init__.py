"""Events over HTTP: the CloudEvents binding, delivery over kept-alive connections, server-sent events, addresses of pods.

May import: eventing, eventing.wire.
"""
