"""Text to token ids and back: tokenizer, chat templates, incremental decoding, stop strings, thoughts, tool calls, grammars.

May import: eventing, eventing.wire, functions.grammars, storage.models.
"""
