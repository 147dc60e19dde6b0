"""Grammars that answers must follow. A grammar is compiled for a tokenizer, and then says which tokens may come next.

The gateway refuses a grammar that does not compile. The last stage masks the tokens that the grammar does not allow.

May import: eventing.wire.
"""
