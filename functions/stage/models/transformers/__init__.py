"""Runs any decoder with transformers' own modules, and tests whether a model can be cut into stages.

May import: functions.stage.models, storage, storage.checkpoints, storage.loading.
"""
