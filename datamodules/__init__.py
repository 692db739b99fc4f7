"""Data: image sets, sources, rewrites, measures, triggers, and the store."""
