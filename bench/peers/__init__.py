"""`make bench-peers`: Lamina beside llama.cpp and vLLM as their own experts would build and configure them."""
