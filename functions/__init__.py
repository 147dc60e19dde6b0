"""The functions that run in pods: stages and gateways, with one entry point, `python -m functions`.

`gateway` and `stage` share only the wire format, `eventing.wire`. Code that both need is in `configuration`, `hosting` and
`observing`.

May import: functions.configuration, functions.hosting, functions.gateway, functions.gateway.fleet, functions.stage.serving.
"""
