"""Tells whether a cluster would accept a Service, by the rules of the API server, Knative's webhook and Kubernetes for pods.

Start at `check`. Sources of the rules, in knative/serving unless said otherwise:

    schema                    config/core/300-resources/service.yaml, and how the API server reads types
    annotations, autoscaling_annotations
                              pkg/apis/autoscaling (annotation_validation.go), pkg/apis/serving (metadata_validation.go)
    podspec                   pkg/apis/serving (k8s_validation.go, fieldmask.go)
    feature_flags             pkg/apis/config (features.go)
    check                     pkg/apis/serving/v1 (route_validation.go) for traffic
    dry_run                   kubernetes/kubernetes pkg/apis/core/validation (validation.go)
    values, violation         quantities and names of k8s.io/apimachinery, Go's durations, knative.dev/pkg/apis (field_error.go)

`warnings` is Lamina's own: mistakes that a cluster accepts. Tests compare all rules with a real cluster's verdicts over 116
manifests (tests/data/webhook-cases.json), recorded with default feature flags; the effect of flags is by the source alone.
Knative's published schema alone finds 8 of the 71 refusals among them.

May import: nothing of Lamina.
"""
