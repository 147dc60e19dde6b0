"""A pipeline on a cluster: deploy, canary, rollback, status, cost, delete.

May import: knative.spec, knative.webhook.
"""
