"""From a PipelineSpec to Kubernetes objects: Services, access, Eventing, monitoring with alerts, dashboard, GitOps; fleets.

May import: storage.models, eventing.wire, functions.configuration, knative.spec, knative.webhook.
"""
