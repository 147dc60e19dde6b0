"""What a function tells of itself: logs, metrics, traces.

May import: nothing of Lamina.
"""
