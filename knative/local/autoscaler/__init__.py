"""How many pods: Knative's autoscaler, the HPA class, their windows and settings, held to recorded decisions.

May import: knative.webhook.
"""
