"""The stand-in for the Trainer's optimizer passes everything on, and a scheduler over it moves the method's learning rates."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import gradlite
from gradlite.train.method_optimizer import MethodOptimizer


def test_a_scheduler_moves_the_methods_rate_before_and_after_loading() -> None:
    method = gradlite.methods.build("adamw", nn.Linear(3, 2), lr=0.5)
    optimizer = MethodOptimizer(method)
    scheduler = LambdaLR(optimizer, lambda number: 1.0 / (1.0 + number))
    for expected in (0.25, 0.5 / 3, 0.125):
        method.backward(method.model(torch.ones(1, 3)).sum())
        optimizer.step()
        scheduler.step()
        assert [group["lr"] for group in method.optimizer.param_groups] == [expected, expected]
        optimizer.load_state_dict(optimizer.state_dict())


def test_steps_gradients_and_state_are_the_methods() -> None:
    method = gradlite.methods.build("adamw", nn.Linear(3, 2), lr=0.5)
    optimizer = MethodOptimizer(method)
    before = [parameter.detach().clone() for parameter in method.model.parameters()]
    method.backward(method.model(torch.ones(1, 3)).sum() * torch.nan)
    optimizer.step()
    assert method.skipped_steps == 1
    assert all(torch.equal(now, then) for now, then in zip(method.model.parameters(), before, strict=True))
    assert optimizer.state_dict().keys() == method.state_dict().keys()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in method.model.parameters())
