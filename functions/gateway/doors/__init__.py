"""Where clients come in: CloudEvents and the OpenAI API, plain and streaming, and the answers that both give.

May import: eventing, eventing.wire, eventing.http, functions.configuration, functions.hosting, functions.observing,
functions.gateway.text, functions.gateway.scheduling.
"""
