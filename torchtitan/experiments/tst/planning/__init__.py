"""Estimates before a job runs: its plan, its dry run, and the layouts that fit."""
