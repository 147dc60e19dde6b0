"""A pipeline on a cluster: deploy, canary, rollback, status, cost, delete.

May import: functions.configuration, knative.spec, knative.webhook.
"""
