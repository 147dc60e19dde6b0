"""The CloudEvents API: generate, embed and score requests as events, each event answered once however often it is delivered.

May import: storage, eventing, eventing.wire, eventing.http, functions.configuration, functions.observing,
functions.gateway.answers, functions.gateway.jobs, functions.gateway.openai, functions.gateway.text.
"""
