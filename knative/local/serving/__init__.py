"""Services, revisions and the way of a request: activator, queue-proxy, breaker, EndpointSlices.

May import: knative.local.http, knative.local.autoscaler, knative.local.kubelet.
"""
