"""The gateway of a fleet: many pipelines behind one address, each with its own part of the gateway, built on first use.

`routing` finds the member that a request's `model` names. `members` knows them by their ConfigMaps, `parts` holds the parts
that are loaded, and gives up idle ones for memory. A part is what `functions.gateway` runs for a single pipeline. `grants`
shares devices out, and `grant_record` is what several gateways agree on.

May import: storage, eventing, eventing.http, eventing.wire, functions.configuration, functions.hosting, functions.gateway,
functions.gateway.answers, functions.gateway.jobs, functions.gateway.openai, functions.gateway.openapi, functions.gateway.page,
functions.gateway.stages.
"""
