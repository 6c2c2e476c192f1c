"""Logit terms hand their settings on to the divergences they are named after."""

from __future__ import annotations

import math

import pytest
import torch

from compress.functional import divergence
from compress.registry import TERMS
from compress.terms.logits import CrossEntropy, JensenShannon

CASES = [
    ({"type": "forward_kl"}, divergence.forward_kl, {}),
    ({"type": "reverse_kl"}, divergence.reverse_kl, {}),
    ({"type": "total_variation"}, divergence.total_variation, {}),
    ({"type": "jensen_shannon", "beta": 0.3}, divergence.jensen_shannon, {"beta": 0.3}),
    ({"type": "skew_forward_kl", "alpha": 0.3}, divergence.skew_forward_kl, {"alpha": 0.3}),
    ({"type": "skew_reverse_kl", "alpha": 0.3}, divergence.skew_reverse_kl, {"alpha": 0.3}),
    (
        {"type": "adaptive_kl", "head_mass": 0.7, "head_rule": "inclusive"},
        divergence.adaptive_kl,
        {"head_mass": 0.7, "head_rule": "inclusive"},
    ),
]


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 6, 11, generator=generator)
    return student, teacher


@pytest.mark.parametrize(("config", "function", "options"), CASES, ids=[case[0]["type"] for case in CASES])
def test_settings_reach_the_divergence(config, function, options, logits) -> None:
    labels = torch.zeros(6, dtype=torch.long)
    found = TERMS.read(config).per_token(*logits, labels)
    assert torch.equal(found, function(*logits, **options))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_with_and_without_smoothing(smoothing: float, logits) -> None:
    labels = torch.tensor([0, 3, 10, 4, 4, 1])
    found = CrossEntropy(label_smoothing=smoothing).per_token(logits[0], None, labels)
    log_q = logits[0].double().log_softmax(-1)
    expected = -(1 - smoothing) * log_q[range(6), labels] - smoothing * log_q.mean(-1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jensen_shannon_is_that_of_trl(beta: float, logits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = pytest.importorskip("trl.experimental.gkd", reason="trl is not installed").GKDTrainer
    labels = torch.zeros(6, dtype=torch.long)
    ours = JensenShannon(beta=beta).per_token(*logits, labels)
    theirs = trainer.generalized_jsd_loss(*logits, beta=beta, reduction="none").sum(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (ours <= math.log(2) + 1e-6).all() or beta in (0.0, 1.0)
    mean = trainer.generalized_jsd_loss(*(side[None] for side in logits), labels=labels[None], beta=beta)
    torch.testing.assert_close(ours.mean(), mean, atol=1e-5, rtol=1e-4)
