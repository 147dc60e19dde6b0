"""Knative on one machine: the same manifests as processes, scaled by the decisions that Knative would make.

`serving` has Services and revisions, `kubelet` their pods, `proxies` what a request passes on its way to them, `autoscaler` how
many pods, `eventing` Brokers, Triggers and Sequences, `http` what all of them speak. Here: the platform that puts them
together, what it tells of itself, and what can go wrong.

May import: knative.webhook, knative.local.*.
"""
