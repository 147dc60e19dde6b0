"""The wire contract: event types, attributes, JSON data, the Batch and its bytes, signatures. Pure functions, no network.

May import: eventing.
"""
