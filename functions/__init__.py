"""`python -m functions`: one entry point for a stage and for the gateway; its environment says which.

`gateway` and `stage` know nothing of each other but what `eventing.wire` says. What both need is in `configuration`,
`hosting` and `observing`.

May import: functions.configuration, functions.hosting, functions.observing, functions.gateway, functions.stage.serving.
"""
