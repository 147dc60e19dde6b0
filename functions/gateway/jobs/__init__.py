"""Files and batches of clients (`/v1/files`, `/v1/batches`): their routes, their objects in the store, and the worker.

The worker answers the lines of batches. All state is in the store, so a gateway may die at any point without loss.

The thread `batches` looks for batches and chooses parts of their input. Each thread `batch-part` works on one part, ends a
batch, or deletes what has expired. Threads `batch-line` answer lines. `batches-hold` keeps the gateway from scaling to zero.
Requests to the APIs have threads of their own and share only the store with these.

May import: storage, storage.store, eventing, eventing.http, eventing.wire, functions.configuration, functions.hosting,
functions.threads, functions.gateway.answers, functions.gateway.openai.
"""
