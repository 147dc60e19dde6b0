"""How many conversations one gateway carries, and what more gateways bring, on stages that sleep (`python -m bench.many`)."""
