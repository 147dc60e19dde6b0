"""How much faster draft tokens make answers that quote, and what they cost those that do not (`make bench-speculation`)."""
