"""Classifiers: the LightningModule that all others extend, backbones, weights files, schedules."""
