"""Runs models of all supported families with transformers' own modules.

May import: functions.stage.models, storage.checkpoints, storage.loading.
"""
