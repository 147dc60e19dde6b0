"""What people see: tables, progress, a question and its answer as it streams, and which errors are told in one line.

May import: storage, storage.models, eventing, eventing.wire, eventing.http, knative.spec, knative.render, knative.cluster,
knative.local, knative.local.autoscaler.
"""
