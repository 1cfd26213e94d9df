"""Keep what a server without a cluster promises: it refuses what would be late, and bounds steps that read prompts."""

import math

import numpy as np

from engine.assembly.assembly import Engine
from engine.async_engine import AsyncEngine
from engine.cluster.roles.role_parts import costs_of
from engine.config.config import ServeConfig
from engine.live.in_time import InTimeAdmission
from engine.live.node_load import NodeJobs, NodeRoom
from engine.runner.step_costs import StepCosts
from scheduler.cluster.routing.cost_estimator import CostEstimator
from scheduler.cluster.routing.slo_admission import RetryTimes, SloAdmission


def keep_in_time(config: ServeConfig, engine: Engine, front: AsyncEngine) -> None:
    """Have `front` answer within the SLO or refuse; to be called before the engine's first step.

    Costs begin as the profile tells them, and follow what the engine's steps turn out to last. Raises InvalidConfig.
    """
    costs, slo, options = costs_of(config), config.cluster.slo, config.engine
    step_s = None if math.isinf(slo.tbt_s) else slo.tbt_s
    learnt = StepCosts((costs.model,), step_s, options.max_num_batched_tokens)
    engine.core.costs = learnt
    room = NodeRoom(options.max_num_seqs, config.max_waiting, options.block_size)
    jobs = NodeJobs(engine.core, learnt, room, lambda: math.inf, 0)
    admission = SloAdmission(CostEstimator(costs.setting(1).forecast), slo)
    front.keep_in_time(InTimeAdmission(admission, jobs, RetryTimes(np.random.default_rng())))
