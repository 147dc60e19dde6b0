"""A pipeline onto a cluster and off it again: the client, what must be true before, the deployer, history, diagnosis.

May import: knative.spec.
"""
