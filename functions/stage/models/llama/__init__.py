"""Llama-shaped families by torch's operators, and by the native layers where they run.

May import: functions.stage.models, functions.stage.native, storage, storage.checkpoints.
"""
