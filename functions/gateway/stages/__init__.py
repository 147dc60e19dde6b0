"""The stages as the gateway sees them: instances and routes, the watch that finds them, a step's trip through them.

May import: eventing, eventing.wire, eventing.http, functions.observing.
"""
