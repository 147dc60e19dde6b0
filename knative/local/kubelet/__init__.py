"""Pods on one machine: containers as processes, probes, restarts, drains.

May import: knative.webhook, knative.local, knative.local.proxies.
"""
