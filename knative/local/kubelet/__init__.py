"""Pods on one machine: containers as processes, probes, restarts, drains, and the process that pods are forked from.

May import: functions, functions.hosting, functions.stage.engine, knative.webhook, knative.local, knative.local.proxies.
"""
