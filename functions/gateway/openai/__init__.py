"""The OpenAI API, plain and streaming: chat completions, completions, responses, models, embeddings; and of vLLM's API
/tokenize, /detokenize, /score and /rerank.

May import: eventing, eventing.wire, eventing.http, functions.configuration, functions.hosting, functions.gateway.answers,
functions.gateway.text.
"""
