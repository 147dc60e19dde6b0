"""What people publish from: Hugging Face folders, hub ids and GGUF files, all seen as one kind of checkpoint.

May import: storage.
"""
