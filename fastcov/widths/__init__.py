"""Widths of the next network, from the spectra of this one."""

from fastcov.widths.controls import power_widths, random_widths, uniform_widths
from fastcov.widths.plan import WidthPlan, demand, solve_widths, suggest_widths
from fastcov.widths.rules import RULES, Rule, find_rule
from fastcov.widths.solver import WidthGroup

__all__ = [
    "RULES",
    "Rule",
    "WidthGroup",
    "WidthPlan",
    "demand",
    "find_rule",
    "power_widths",
    "random_widths",
    "solve_widths",
    "suggest_widths",
    "uniform_widths",
]
