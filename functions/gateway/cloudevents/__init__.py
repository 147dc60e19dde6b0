"""The CloudEvents API: generate and score requests as events, each event answered once however often it is delivered.

May import: eventing, eventing.wire, eventing.http, functions.observing, functions.gateway.answers, functions.gateway.text.
"""
