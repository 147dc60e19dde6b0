"""Files and batches of clients (`/v1/files`, `/v1/batches`): their paths, their objects in the store, and the worker that
answers the lines of batches. Their state is in the store and nowhere else, so every gateway may die at any point.

May import: storage, storage.store, eventing, eventing.http, eventing.wire, functions.configuration, functions.hosting,
functions.threads, functions.gateway.answers, functions.gateway.openai.
"""
