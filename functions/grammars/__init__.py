"""Grammars that answers must follow. Compiled for a tokenizer, a grammar says which tokens may come next.

The gateway refuses a grammar that does not compile; the last stage masks the tokens that it does not allow.

May import: eventing.wire.
"""
