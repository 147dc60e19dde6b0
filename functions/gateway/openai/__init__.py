"""The OpenAI API, plain and streaming: chat completions, completions, responses, models; files and batches; and vLLM's
/tokenize and /detokenize.

May import: storage, eventing, eventing.wire, eventing.http, functions.configuration, functions.hosting, functions.observing,
functions.gateway.answers, functions.gateway.jobs, functions.gateway.text.
"""
