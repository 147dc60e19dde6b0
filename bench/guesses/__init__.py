"""How much faster guesses make answers that quote, and what they cost those that do not (`make bench-guesses`)."""
