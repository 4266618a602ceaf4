"""Recommenders of other libraries, each trained and timed in a process of its own, beside ours."""

PYTHON_VARIABLE = "ADREC_RECBOLE_PYTHON"
"""Environment variable that names the python of an environment with RecBole."""
