"""From a PipelineSpec to Kubernetes objects: Services, access, Eventing, monitoring with alerts, dashboard, GitOps.

May import: storage.models, eventing.wire, knative.spec, knative.webhook.
"""
