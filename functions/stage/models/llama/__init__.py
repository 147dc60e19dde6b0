"""Runs models of Llama-shaped families with torch's operators, and describes the structure of these models.

May import: functions.stage.models, storage, storage.checkpoints, storage.loading, storage.models.
"""
