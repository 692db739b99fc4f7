"""Studies: a grid of configs in stages, declared in YAML; every table and figure of the project comes from one.

A *stage* is a config with a grid of overrides and seeds; a later stage may name an earlier one's weights. A *cell* is
one point of a stage's grid. It has an identity – the hash of everything that determines it – and, once it has run, a
folder of that name: a finished cell never runs again, and a killed study goes on where it was.
"""
