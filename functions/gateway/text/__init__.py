"""Text to token ids and back: the published tokenizer, chat templates, text as it becomes certain, stop strings.

May import: eventing, eventing.wire, functions.grammars, storage.models.
"""
