"""The OpenAPI document: every path of the gateway with its types and statuses.

May import: eventing, eventing.wire, eventing.http, functions.gateway.jobs, functions.gateway.openai,
functions.gateway.page.
"""
