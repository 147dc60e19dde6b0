"""The CloudEvents API: generate, embed and score requests as events. An event that is delivered again gets the same answer.

May import: storage, eventing, eventing.wire, eventing.http, functions.configuration, functions.observing,
functions.gateway.answers, functions.gateway.jobs, functions.gateway.openai, functions.gateway.text.
"""
