"""Ranger as an optimizer: closure, groups, parameters without gradient, arguments, saving."""

import pytest
import torch
from torch import nn

from psp_lightning.optim import Ranger
from psp_lightning.utils.errors import UserError


def test_closure_runs_once_with_gradients_and_its_value_returns():
    p = nn.Parameter(torch.ones(3))
    optimizer = Ranger([p], lr=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure).detach()) == 3.0
    assert calls == [True]
    assert (p < 1).all(), "the first step must descend"


def test_first_steps_descend():
    p = nn.Parameter(torch.ones(1))
    optimizer = Ranger([p], lr=1e-2)
    seen = []
    for _ in range(20):
        p.grad = p.detach().clone()
        optimizer.step()
        seen.append(float(p.detach()))
    assert all(a >= b for a, b in zip(seen[:5], seen[1:5], strict=False)), f"ascended: {seen}"


def test_parameter_without_gradient_stays_and_may_join_later():
    used, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Ranger([used, late], lr=0.1)
    for step in range(12):
        used.grad = torch.ones(2)
        late.grad = torch.ones(2) if step >= 4 else None
        optimizer.step()
        if step == 3:
            assert torch.equal(late, torch.ones(2))
            assert late not in optimizer.state
    assert int(optimizer.state[used]["step"]) == 12
    assert int(optimizer.state[late]["step"]) == 8


def test_groups_keep_their_own_options():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = Ranger([{"params": [a], "k": 1}], lr=0.1)
    optimizer.add_param_group({"params": [b], "alpha": 0.25})
    assert [(g["k"], g["alpha"], g["lr"]) for g in optimizer.param_groups] == [(1, 0.5, 0.1), (6, 0.25, 0.1)]


def test_state_is_plain(tmp_path):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = Ranger([p], betas=[0.9, 0.99])
    p.grad = torch.ones(2, 2)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["param_groups"][0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 1.5}, {"k": 0}, {"k": 2.5}])
def test_unusable_options_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Ranger([nn.Parameter(torch.ones(1))], **options)
