"""The gateway: requests become sequences, sequences go round the stages in micro-batches, tokens become answers. No torch.

`doors` is what clients see, `text` turns text into tokens and back, `scheduling` decides what is sent when, `stages` sends
it and knows which instances there are. Here: the pieces put together.

May import: storage, storage.store, eventing, eventing.http, functions.configuration, functions.hosting, functions.observing,
functions.gateway.doors, functions.gateway.text, functions.gateway.scheduling, functions.gateway.stages.
"""
