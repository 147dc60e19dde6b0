"""The structure of Llama-shaped models, and their layers by torch's operators.

May import: functions.stage.models, storage, storage.checkpoints, storage.loading, storage.models.
"""
