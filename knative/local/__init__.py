"""Knative on one machine: the same manifests as processes, scaled by the decisions that Knative would make.

`serving` has Services and revisions, `kubelet` their pods, `proxies` the activator and queue-proxy, `autoscaler` the number of
pods, `eventing` Brokers, Triggers and Sequences, `http` the server and client that all of them use. This folder itself has the
platform that joins them, its admin port, its errors, and the command. README.md tells how to use it without the rest of Lamina.

May import: knative.webhook, knative.local.*.
"""
