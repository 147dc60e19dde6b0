"""The command line. A command's module is imported when the command is called; short commands share a module.

`options` and `state_folder` find the cluster, store and pipeline that a command works on; `console` prints.

May import: storage, storage.store, storage.checkpoints, storage.kv, storage.models, eventing, eventing.http, eventing.wire,
functions.configuration, functions.gateway.answers, functions.gateway.scheduling, functions.stage.engine,
functions.stage.models, functions.stage.models.transformers,
functions.stage.native, knative.*.
"""
