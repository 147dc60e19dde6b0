"""Programs that people ask models with, unmodified, against a real pipeline.

Their dependencies are heavy, and live in an environment of their own (`make test-clients`); a test whose client is not there
says so and is skipped.
"""
