"""Stochastic sampling steps with densities, over diffusers' schedulers."""

from lit_align.schedulers.base import StepOutput, StochasticScheduler
from lit_align.schedulers.ddim import StochasticDDIM
from lit_align.schedulers.flow_match import StochasticFlowMatch

__all__ = ["StepOutput", "StochasticDDIM", "StochasticFlowMatch", "StochasticScheduler"]
