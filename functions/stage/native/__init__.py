"""Layers of Llama-shaped models in machine code. Knows addresses and sizes, no model and no engine.

May import: nothing of Lamina.
"""
