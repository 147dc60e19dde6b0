"""Pods as processes: the command of a container, its probes and memory, restarts and drains.

May import: knative.webhook, knative.local, knative.local.proxies.
"""
