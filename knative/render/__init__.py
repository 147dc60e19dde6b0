"""From a PipelineSpec to Kubernetes objects: Services, access, network policy, Eventing, monitoring, alerts, dashboard.

May import: storage.models, eventing.wire, knative.spec, knative.webhook.
"""
