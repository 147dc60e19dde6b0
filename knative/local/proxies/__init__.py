"""What a request passes on its way to a function: the activator of a revision, a pod's queue-proxy, what they hold and count.

May import: knative.local.http.
"""
