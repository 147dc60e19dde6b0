"""Decides how many pods a revision gets, by Knative's autoscaler (class KPA) or by the class HPA.

Tests compare the class KPA with decisions recorded from Knative.

May import: knative.webhook.
"""
