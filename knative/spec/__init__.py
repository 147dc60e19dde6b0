"""What a person says of a pipeline, and what is derived from it and the model: its shape, its cut, what its stages need.

Also what a Kubernetes object is here, which `render` makes, `cluster` applies and `local` runs.

May import: storage, storage.checkpoints, storage.models, eventing.wire, functions.configuration, functions.gateway.scheduling,
functions.stage.native, knative.webhook.
"""
