"""Federated meta-learning with Flower: clients send biased meta-gradients, and the server steps with momentum.

    app = client_app(make_learner, tasks, bias="ef21:topk:5%")                     # a flwr.clientapp.ClientApp
    strategy = MomentumStrategy(lambda p: CompositeMomentum(p, lr=0.1), bias="ef21:topk:5%")
    result = strategy.start(grid, to_arrays(learner), num_rounds=100)              # in Flower's ServerApp

A client is a worker. Importing this module imports Flower.
"""

from __future__ import annotations

from metamom.interop.flower_client import client_app
from metamom.interop.flower_messages import from_arrays, to_arrays
from metamom.interop.flower_strategy import MomentumStrategy

__all__ = ["MomentumStrategy", "client_app", "from_arrays", "to_arrays"]
