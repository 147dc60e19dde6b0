"""Models in an S3-compatible store: published once, read by every pod. Knows no events and no Knative.

`store` speaks S3, `checkpoints` reads published formats (Hugging Face folders, GGUF), `models` defines the layout of published
models, `loading` brings a stage's layers into memory, `kv` keeps keys and values. `errors` has one class per error condition,
`floats` reads and rounds numbers.

May import: nothing of Lamina.
"""
