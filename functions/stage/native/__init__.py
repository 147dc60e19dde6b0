"""Runs the layers of Llama-shaped models and draws tokens, in C. The C source is in `c/`, its interface in `c/native.h`.

The package passes arrays and sizes to C. It knows neither model configs nor the engine.

May import: nothing of Lamina.
"""
