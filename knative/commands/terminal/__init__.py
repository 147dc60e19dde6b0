"""What people see: tables, progress, a question and its answer as it streams.

May import: storage.models, eventing, eventing.wire, eventing.http, knative.spec, knative.commands.sources.
"""
