"""What a person says of a pipeline, and what is derived from it and the model: its shape, its cut.

May import: storage, eventing.wire, functions.gateway.scheduling.
"""
