"""Any other family, by transformers' own modules.

May import: functions.stage.models, storage.loading.
"""
