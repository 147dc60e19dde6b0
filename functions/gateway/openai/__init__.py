"""The OpenAI API, plain and streaming: chat completions, completions, responses, models; and vLLM's /tokenize and /detokenize.

May import: eventing, eventing.wire, eventing.http, functions.configuration, functions.hosting, functions.observing,
functions.gateway.answers, functions.gateway.text.
"""
