"""A pipeline onto a cluster and off it again: client, preflight, lease, deployer, canary, history, garbage, diagnosis, status.

May import: knative.spec, knative.webhook.
"""
