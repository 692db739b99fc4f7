"""Model extraction: an oracle that answers for money, and what can be trained from its answers."""
