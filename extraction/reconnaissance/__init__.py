"""What a stolen copy is good for afterwards: attacks on the victim that are prepared on the surrogate."""
