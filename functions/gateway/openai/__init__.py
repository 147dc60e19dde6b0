"""The OpenAI API, plain and streaming, and some paths of vLLM's API.

Served are chat completions, completions, responses, models and embeddings, and from vLLM /tokenize, /detokenize, /score and
/rerank.

May import: eventing, eventing.wire, eventing.http, functions.configuration, functions.hosting, functions.gateway.answers,
functions.gateway.text.
"""
