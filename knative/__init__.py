"""`python -m knative`: from a PipelineSpec to a pipeline on a cluster, or on this machine.

`spec` is what a person says, `render` makes Kubernetes objects of it, `webhook` says whether a cluster would take them,
`cluster` applies them, `local` is Knative on one machine, `commands` is the command line.

May import: knative.commands.terminal.
"""
