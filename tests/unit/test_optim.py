"""Ranger as an optimizer: closure, groups, parameters without gradient, arguments, saving."""

import pytest
import torch
from torch import nn

from psp_lightning.optim import Ranger, ranger
from psp_lightning.utils.errors import UserError


def test_closure_runs_once_with_gradients_and_its_value_is_returned():
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


def test_radam_options_of_a_group_are_used():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Ranger([{"params": [p], "maximize": True}, {"params": [q]}], lr=0.1)
    for _ in range(9):
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
    assert (p > 1).all() and (q < 1).all()


def test_complex_parameters_and_sparse_gradients():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = Ranger([p], lr=0.1)
    for _ in range(9):
        p.grad = torch.ones(2, dtype=torch.complex64)
        optimizer.step()
    assert (p.real < 1).all()
    q = nn.Parameter(torch.ones(2))
    q.grad = torch.ones(2).to_sparse()
    with pytest.raises(UserError, match="no sparse gradients"):
        Ranger([q]).step()


def run(parameters, gradients, **options):
    """Return the parameters after a step with each of the gradients."""
    parameters = [nn.Parameter(p.clone()) for p in parameters]
    optimizer = Ranger(parameters, lr=1e-2, **options)
    for step in gradients:
        for p, gradient in zip(parameters, step, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("batch", [1, 1 << 20])
def test_the_fused_step_equals_radams(monkeypatch, options, batch):
    """This includes gradients in another memory format, parameters that join late, and few parameters at a time."""
    torch.manual_seed(0)
    last = {"memory_format": torch.channels_last}
    parameters = [torch.randn(4, 3, 3, 3).contiguous(**last), torch.randn(4, 3, 3, 3), torch.randn(5), torch.randn(2)]
    parameters.append(torch.randn(3, 2, 3, 3).contiguous(**last))
    gradients = [[torch.randn(p.shape) for p in parameters] for _ in range(15)]
    for i, step in enumerate(gradients):
        step[1], step[4] = step[1].contiguous(**last), step[4].contiguous(**last)
        step[3] = step[3] if i > 4 else None
    monkeypatch.setattr(ranger, "CPU_BATCH", batch)
    found = run(parameters, gradients, **options)
    calls = []
    monkeypatch.setattr(ranger, "adamw", lambda *args, **kwargs: calls.append(args))
    run(parameters, gradients[:7], **options)
    assert calls, "the fused step was never taken"
    monkeypatch.setattr(ranger, "_can_fuse", lambda p, state: False)
    for a, b in zip(found, run(parameters, gradients, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_fused_step_copies_no_gradient():
    p = nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer = Ranger([p])
    for _ in range(7):
        p.grad = torch.randn_like(p)
        optimizer.step()
    p.grad = torch.randn_like(p)
    with torch.profiler.profile() as profile:
        optimizer.step()
    names = [event.name for event in profile.events()]
    assert "aten::_fused_adamw_" in names
    assert "aten::clone" not in names


def test_the_fused_step_increments_the_version_counter():
    """PyTorch's version counter shows that values derived from a parameter before the step are outdated."""
    p = nn.Parameter(torch.randn(3))
    optimizer = Ranger([p], k=100)
    for _ in range(8):
        p.grad, before = torch.randn(3), p._version
        optimizer.step()
        assert p._version > before
