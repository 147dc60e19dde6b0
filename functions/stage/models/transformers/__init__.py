"""Runs any decoder of transformers with its own modules, and tries whether a model can be cut.

May import: functions.stage.models, storage, storage.checkpoints, storage.loading.
"""
