"""Estimates of log p(x): importance weights, proposals, evaluation of a data set, and audits."""
