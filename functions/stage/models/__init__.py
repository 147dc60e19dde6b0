"""What a stage runs: the interface of a layer group, the families, and the choice between the ways to run one.

May import: functions.stage.models.llama, functions.stage.models.transformers.
"""
