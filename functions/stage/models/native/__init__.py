"""Runs models on a CPU as their descriptions say: layers in C, everything else in numpy. Needs no torch.

May import: functions.stage.models, functions.stage.models.llama, functions.stage.native, storage.checkpoints,
storage.loading, storage.models.
"""
