"""Runs models on a CPU, by their descriptions: layers and head in C, everything else in numpy. Needs no torch.

May import: functions.stage.models, functions.stage.models.llama, functions.stage.native, storage.checkpoints,
storage.loading, storage.models.
"""
