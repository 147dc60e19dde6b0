"""The stages as the gateway sees them: instances and routes, the watch that finds them, one event's way through them.

May import: eventing, eventing.wire, eventing.http, functions.observing.
"""
