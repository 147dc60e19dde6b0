"""Knative on one machine: the same manifests as processes, scaled by the decisions that Knative would make.

`serving` has Services and revisions, `kubelet` their pods, `autoscaler` how many, `eventing` Brokers, Triggers and
Sequences, `http` what all of them speak. Here: the platform that puts them together, and what it tells of itself.

May import: storage, storage.store, knative.webhook, knative.local.*.
"""
