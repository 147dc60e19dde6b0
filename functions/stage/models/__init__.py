"""What a stage runs: the interface of a layer group, the families, and the choice between the ways to run one.

May import: functions.configuration, functions.stage.models.llama, functions.stage.models.native,
functions.stage.models.transformers, storage, storage.checkpoints, storage.loading, storage.models.
"""
