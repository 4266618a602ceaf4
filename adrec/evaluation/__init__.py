"""Evaluation by full ranking: metrics with intervals, strata, the popularity baseline."""

from __future__ import annotations

from adrec.evaluation.metrics import CUTOFFS, METRICS, Interval, interval_table, point_metrics, target_ranks
from adrec.evaluation.paired import kept_percent, ndcg_gains
from adrec.evaluation.protocol import Evaluation, evaluate, popularity_evaluation, top_overlap
from adrec.evaluation.strata import head_items, length_groups, popularity_groups, stratify

__all__ = [
    "CUTOFFS",
    "METRICS",
    "Evaluation",
    "Interval",
    "evaluate",
    "head_items",
    "interval_table",
    "kept_percent",
    "length_groups",
    "ndcg_gains",
    "point_metrics",
    "popularity_evaluation",
    "popularity_groups",
    "stratify",
    "target_ranks",
    "top_overlap",
]
