"""A pipeline onto a cluster and off it again: the client, what must be true before, deployer, garbage, history, diagnosis.

May import: knative.spec.
"""
