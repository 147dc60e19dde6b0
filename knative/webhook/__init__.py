"""Whether a cluster would accept a Service: the rules of Knative's webhook, of the API server and of the pod, in their own
words.

Sources: knative/serving pkg/apis/serving (k8s_validation.go, fieldmask.go, v1/*_validation.go), pkg/apis/autoscaling, and
config/core/300-resources/service.yaml, held to the verdicts of a real cluster (tests/data/webhook-cases.json). Knative's
published schema alone finds 8 of its 71 refusals, which is why this is here.

May import: nothing of Lamina.
"""
