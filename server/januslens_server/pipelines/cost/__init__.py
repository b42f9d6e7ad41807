"""Estimate the cost of a request before it runs, from its amount of work and a measured pace."""

from januslens_server.pipelines.cost.demand import Demand
from januslens_server.pipelines.cost.estimate import demand_of
from januslens_server.pipelines.cost.pace import Pace, measured_pace

__all__ = ["Demand", "Pace", "demand_of", "measured_pace"]
