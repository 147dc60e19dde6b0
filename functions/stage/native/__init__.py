"""Runs the layers of Llama-shaped models and draws tokens, in C. The C source is in `c/`, and its interface is `c/native.h`.

The package passes arrays and sizes to C. It does not know model configs or the engine.

May import: nothing of Lamina.
"""
