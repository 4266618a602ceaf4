"""Turning a trained model into a cheaper one, or into a file another runtime reads.

Nothing is offered here yet: step respacing, the one reduction that needs no training, is `adrec.schedule.respace`.
"""
