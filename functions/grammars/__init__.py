"""What an answer must look like: grammars, compiled for a tokenizer, and the tokens that they allow.

Both functions need it: the gateway refuses what does not compile, the last stage masks.

May import: eventing.wire.
"""
