"""Runs models of Llama-shaped families on a CPU: their layers in C, everything else in numpy. Needs no torch.

May import: functions.stage.models, functions.stage.models.llama, functions.stage.native, storage.checkpoints,
storage.loading, storage.models.
"""
