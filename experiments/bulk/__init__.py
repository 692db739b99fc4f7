"""Functions that are stages of studies: what trains, crafts or changes many things at once."""
