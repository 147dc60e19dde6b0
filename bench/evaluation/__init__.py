"""The evaluation (`make evaluate`, docs/evaluation.md): five ways to serve a model on one budget of devices."""
