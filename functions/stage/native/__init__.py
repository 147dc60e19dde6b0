"""Layers of Llama-shaped models in C (`c/`, whose contract is `native.h`). Knows addresses and sizes, no model, no engine.

May import: nothing of Lamina.
"""
