"""The evaluation (`make evaluate`, docs/benchmarks.md): five ways to serve a model on one budget of devices."""
