"""The stages as the gateway sees them: instances, routes, the watch that finds instances, and trips through all stages.

May import: eventing, eventing.wire, eventing.http, functions.observing.
"""
