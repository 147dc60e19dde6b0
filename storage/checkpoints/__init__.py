"""Reads models in published formats (Hugging Face folders, hub ids, GGUF files), all as one kind of checkpoint.

`model_source` finds a checkpoint and opens it with the reader of its format. Every reader returns a `Checkpoint`: config.json,
small files, and tensors by their Hugging Face names. `model_description` and `decoder_config` derive the model's sizes and
layers from config.json.

May import: storage.
"""
