"""Watermarking by backdooring with commitments: keys, marking, verification."""
