"""The command line, a file for each command. A command's module is imported when it is called.

`terminal` is what people see, `sources` where commands find clusters, stores and files.

May import: storage, storage.store, storage.checkpoints, storage.kv, storage.models, eventing, eventing.wire,
functions.configuration, functions.gateway.scheduling, knative.*.
"""
