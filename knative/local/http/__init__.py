"""HTTP/1.1 as a streaming proxy needs it: heads as bytes, bodies as they arrive.

May import: nothing of Lamina.
"""
