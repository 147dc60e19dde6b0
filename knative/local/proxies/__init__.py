"""The proxies that a request passes on its way to a pod: the activator and the pod's queue-proxy.

May import: knative.local.http.
"""
