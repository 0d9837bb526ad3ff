"""The recurrence: GRU, AIGRU, AGRU and the AUGRUs, all one step with different scalars.

Room card. Lives here: ``op.py`` (public ops, checks, autograd), ``reference.py`` (the definition),
one file a backend. May import: ``ops/_*.py``. Must not be here: modules with parameters, attention scores.
"""
