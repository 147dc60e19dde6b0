"""Brokers, Triggers and Sequences on one machine, from the same YAML as on a cluster.

May import: eventing, eventing.wire, eventing.http, knative.local, knative.local.http.
"""
