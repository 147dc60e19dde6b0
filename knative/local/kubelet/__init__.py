"""Runs pods as processes: a container's command, its probes and memory limit, restarts and drains.

May import: knative.webhook, knative.local, knative.local.proxies.
"""
