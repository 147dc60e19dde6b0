"""What a Llama-shaped model looks like, and how torch's operators run it.

May import: functions.stage.models, storage, storage.checkpoints, storage.loading, storage.models.
"""
