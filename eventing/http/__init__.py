"""Events over HTTP: the CloudEvents binding, delivery over kept-alive connections, server-sent events.

Addresses of pods and the targets of requests are read here, too.

May import: eventing, eventing.wire.
"""
