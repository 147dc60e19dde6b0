"""Llama-shaped families by layers in C, with numpy around them. Needs no torch.

May import: functions.stage.models, functions.stage.models.llama, functions.stage.native, storage.checkpoints,
storage.loading, storage.models.
"""
