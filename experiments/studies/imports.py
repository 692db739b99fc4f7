"""All that a cell's process imports: the server that a pool's processes are forked from begins with this."""

import sklearn.datasets  # of Digits, which imports it late: it takes seconds

from experiments import cli
from experiments.registry import import_all
from experiments.studies import resolve, work

__all__ = ["cli", "resolve", "sklearn", "work"]

import_all()
