"""A stage: consecutive layers of a model behind HTTP. `serving` → `engine` → `models` → `native`.

May import: nothing of Lamina.
"""
