"""Any other family, run by transformers' own modules.

May import: functions.stage.models, storage.loading.
"""
