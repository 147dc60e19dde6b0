"""Which cluster, which store, which files, which pipeline a command works on.

May import: storage, storage.store, storage.checkpoints, storage.models, functions.configuration, functions.stage.engine,
functions.stage.native, storage.kv, knative.spec, knative.render, knative.webhook, knative.cluster, knative.local,
knative.local.kubelet, knative.commands.terminal.
"""
