"""Models in an S3-compatible store: published once, read by every pod. Knows no events and no Knative.

`store` speaks S3, `checkpoints` reads what people have, `models` is the layout of published models, `loading` brings a
stage's layers into memory. Here: `errors`, one class per condition.

May import: nothing of Lamina.
"""
