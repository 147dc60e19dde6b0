"""Layers of Llama-shaped models in C (`c/`, whose `native.h` is the contract). Knows addresses and sizes, no model, no engine.

May import: nothing of Lamina.
"""
