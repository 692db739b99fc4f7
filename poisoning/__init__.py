"""Data poisoning: attacks and defences, one datamodule per file, and the victim that is trained on their data."""
