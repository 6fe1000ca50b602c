"""The demonstration: a real model, four rows in one batch, four different plans, and every promise checked."""

from saeguard.demo.job import Result, run_demo
from saeguard.demo.proofs import prove
from saeguard.demo.rows import ROWS, DemoRow

__all__ = ["ROWS", "DemoRow", "Result", "prove", "run_demo"]
