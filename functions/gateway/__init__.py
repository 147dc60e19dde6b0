"""The gateway: requests become sequences, sequences pass the stages in micro-batches, tokens become answers. No torch.

Clients speak to `openai`, `cloudevents` and `page`, which `openapi` describes; `answers` is what these share. `text` turns text
into tokens and back, `jobs` keeps files and batches, `scheduling` decides which steps begin and when, `stages` sends them and
knows the instances. The files here put the parts together.

May import: storage, storage.store, eventing, eventing.http, functions.configuration, functions.hosting, functions.observing,
functions.gateway.answers, functions.gateway.openai, functions.gateway.cloudevents, functions.gateway.page,
functions.gateway.openapi, functions.gateway.jobs, functions.gateway.text, functions.gateway.scheduling,
functions.gateway.stages.
"""
