"""The commands of ``python -m thor_fx`` that look at a model of the user's."""
