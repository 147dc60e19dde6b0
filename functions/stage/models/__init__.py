"""Layer groups: their interface, and the choice of an implementation.

May import: eventing.wire, functions.configuration, functions.stage.models.llama, functions.stage.models.native,
functions.stage.models.transformers, functions.stage.native, storage, storage.checkpoints, storage.loading,
storage.models.
"""
