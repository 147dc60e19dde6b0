"""How many pods a revision gets: Knative's autoscaler and the HPA class, held to decisions recorded from Knative.

May import: knative.webhook.
"""
