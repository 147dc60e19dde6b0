"""Published formats (Hugging Face folders, hub ids, GGUF files), all read as one kind of checkpoint.

`model_source` finds a checkpoint and opens it by its format. The reader of a format returns a `Checkpoint`: config.json, small
files, and tensors by their Hugging Face names. `model_description` and `decoder_config` say from config.json what the model is.

May import: storage.
"""
