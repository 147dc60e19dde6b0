"""The pipeline spec, the model's shape, the cut, and what each stage needs. Also Kubernetes objects as dicts, and their YAML.

May import: storage, storage.checkpoints, storage.models, eventing.wire, functions.configuration, functions.gateway.scheduling,
functions.stage.models, functions.stage.native, knative.webhook.
"""
