"""Files and batches of clients (`/v1/files`, `/v1/batches`): their paths, their objects in the store, and the worker that
answers the lines of batches. Their state is in the store and nowhere else, so every gateway may die at any point.

The thread `batches` looks for batches and chooses parts. Threads `batch-part` work on a part each, end batches and delete what
has expired; threads `batch-line` answer lines. `batches-hold` keeps the gateway from zero. Requests to the APIs have threads of
their own and share nothing with these but the store.

May import: storage, storage.store, eventing, eventing.http, eventing.wire, functions.configuration, functions.hosting,
functions.threads, functions.gateway.answers, functions.gateway.openai.
"""
