"""Objectives to train on, the bounds behind them, and schedules of their options."""
