"""The gateway of a fleet: many pipelines behind one address, each with its own part of the gateway, built on first use.

`routing` finds the member that a request's `model` names. `members` knows them by their ConfigMaps, `parts` holds the parts
that are loaded, and gives up idle ones for memory. A part is what `functions.gateway` runs for a single pipeline. `grants`
shares devices out, and `grant_record` is what several gateways agree on.

Requests have threads of their own, in which they wait for devices and for parts that are loaded. The server's poller looks for
API keys. The watches' threads take over ConfigMaps (`Members.changed`, which closes parts) and EndpointSlices. `fleet-grants`
decides who gets devices, `fleet-overview` looks at all members, `fleet-memory` gives up idle parts, and `fleet-batches` loads
those with open batches. Members, Parts, Grants and Overview have a lock each, and hold it for no request to another process.

May import: storage, eventing, eventing.http, eventing.wire, functions.configuration, functions.hosting, functions.gateway,
functions.gateway.answers, functions.gateway.jobs, functions.gateway.openai, functions.gateway.openapi, functions.gateway.page,
functions.gateway.stages.
"""
