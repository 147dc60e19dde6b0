"""The gateway of a fleet: many pipelines behind one address. Each member has its own part of the gateway, built on first use.

`routing` finds the member that a request's `model` names. `members` reads the members' ConfigMaps. `parts` keeps the loaded
parts and closes idle ones to free memory. A part is what `functions.gateway` runs for a single pipeline. `grants` divides
devices among members, and `grant_record` is the state that several gateways share.

Threads: each request has one, in which it waits for a device and for its part. The server's poller looks up API keys. The
watches' threads apply changed ConfigMaps (`Members.changed`, which closes parts) and EndpointSlices. `fleet-grants` decides
which members get devices, `fleet-overview` samples all members, `fleet-memory` closes idle parts, and `fleet-batches` loads
parts with open batches. Members, Parts, Grants and Overview have a lock each, and never hold it during a request to another
process.

May import: storage, eventing, eventing.http, eventing.wire, functions.configuration, functions.hosting, functions.gateway,
functions.gateway.answers, functions.gateway.jobs, functions.gateway.openai, functions.gateway.openapi, functions.gateway.page,
functions.gateway.stages.
"""
