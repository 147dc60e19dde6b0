"""`python -m knative`: from a PipelineSpec to a pipeline on a cluster, or on this machine.

`spec` is the description of a pipeline, `render` makes Kubernetes objects of it, `webhook` checks them as Knative would,
`cluster` applies them, `local` is Knative on one machine, `commands` is the command line.

May import: knative.commands.
"""
