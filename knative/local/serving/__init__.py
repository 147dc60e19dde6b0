"""Services with their URLs, revisions with their pods, and the EndpointSlices that announce the pods.

May import: knative.webhook, knative.local, knative.local.http, knative.local.autoscaler, knative.local.proxies,
knative.local.kubelet.
"""
