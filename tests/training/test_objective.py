"""One forward a side, logits in chunks: the same numbers and gradients as the plain computation."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from compress.models import family_of
from compress.terms.causal_kv import CausalKV
from compress.terms.hidden_mse import HiddenMSE
from compress.terms.logits import AdaptiveKL, CrossEntropy, ForwardKL
from compress.terms.token_contrastive import TokenContrastive
from compress.training import objective as module
from compress.training.forward import Side, nll
from compress.training.objective import Objective


def _side(model):
    return Side(model, family_of(model.config))


def _batch(model, tiny_inputs):
    inputs = tiny_inputs(model, batch=3, length=9)
    target = inputs["decoder_input_ids"] if model.config.is_encoder_decoder else inputs["input_ids"]
    labels = target.roll(-1, 1)
    labels[:, -1] = -100
    inputs["labels"] = labels
    if model.config.is_encoder_decoder:
        inputs["decoder_attention_mask"] = torch.ones_like(target)
    else:
        labels[inputs["attention_mask"] == 0] = -100
    return inputs


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_chunked_terms_equal_the_plain_computation(kind, chunk, request, tiny_inputs, monkeypatch):
    monkeypatch.setattr(module, "chunk_size", lambda side, device: chunk)
    student, teacher = request.getfixturevalue(kind)(seed=0), request.getfixturevalue(kind)(seed=1)
    batch = _batch(student, tiny_inputs)
    terms = [CrossEntropy(weight=0.5), ForwardKL(weight=2.0)]
    total, values = Objective(_side(student), terms, teacher=_side(teacher))(batch)
    total.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    student.zero_grad()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    scored = batch["labels"] != -100
    ours, theirs = student(**inputs).logits[scored], teacher(**inputs).logits[scored].detach()
    cross = F.cross_entropy(ours, batch["labels"][scored])
    forward = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    (0.5 * cross + 2.0 * forward).backward()
    torch.testing.assert_close(values["cross_entropy"], cross.detach(), atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(values["forward_kl"], forward.detach(), atol=1e-5, rtol=1e-5, check_dtype=False)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("vocab", "chunk"), [(67, 2**22 // 67), (8192, 512), (50257, 256)])
def test_chunks_are_as_large_as_a_gradient_of_the_head_is_worth(vocab, chunk, tiny_gpt2):
    assert module.chunk_size(_side(tiny_gpt2(vocab=vocab)), torch.device("cpu")) == chunk


class _Casts(TorchDispatchMode):
    """Counts the casts to bfloat16 of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += out.shape == self.shape and out.dtype == torch.bfloat16
        return out


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_a_head_is_cast_once_a_step_whatever_the_chunks(kind, request, tiny_inputs, monkeypatch):
    student, teacher = (request.getfixturevalue(kind)(seed=seed, vocab=71) for seed in (0, 1))
    teacher.requires_grad_(False)
    before = {name: (tensor, tensor.clone()) for name, tensor in teacher.state_dict(keep_vars=True).items()}
    objective = Objective(_side(student), [ForwardKL()], teacher=_side(teacher), autocast=torch.bfloat16)
    batch, found = _batch(student, tiny_inputs), {}
    for chunk in (1000, 4):
        monkeypatch.setattr(module, "chunk_size", lambda side, device, chunk=chunk: chunk)
        with _Casts(student.lm_head.weight.shape) as casts:
            found[chunk] = objective(batch)[0]
        assert casts.count == 2, chunk
    torch.testing.assert_close(found[4], found[1000], atol=1e-5, rtol=1e-5)
    for name, tensor in teacher.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])
        assert tensor.dtype == before[name][1].dtype


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_every_distance_is_zero_for_the_teacher_itself(kind, request, tiny_inputs):
    model = request.getfixturevalue(kind)()
    copy = deepcopy(model)
    terms = [ForwardKL(), AdaptiveKL(), HiddenMSE(), CausalKV()]
    _, values = Objective(_side(model), terms, teacher=_side(copy))(_batch(model, tiny_inputs))
    for name, value in values.items():
        assert abs(value.item()) < 1e-5, name


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_nll_is_the_models_own_loss(kind, request, tiny_inputs):
    model = request.getfixturevalue(kind)()
    batch = _batch(model, tiny_inputs)
    value, count = nll(_side(model), batch)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=-100)
    assert count == (batch["labels"] != -100).sum()
    assert value == pytest.approx(expected.item(), rel=1e-5)


def test_padding_changes_no_loss(tiny_gpt2, tiny_inputs):
    student, teacher = tiny_gpt2(seed=0), tiny_gpt2(seed=1)
    short = {"input_ids": torch.randint(3, 67, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    short["labels"] = short["input_ids"].roll(-1, 1)
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    long = {name: F.pad(tensor, (0, 5), value=pad[name]) for name, tensor in short.items()}
    terms = [ForwardKL(), HiddenMSE(), CausalKV(), TokenContrastive(momentum=0.0, size=8)]
    objective = Objective(_side(student), terms, teacher=_side(teacher))
    a, b = objective(short)[1], objective(long)[1]
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)


def test_kv_and_hidden_terms_compare_only_kept_units(tiny_gpt2, tiny_inputs):
    """The teacher's removed units may hold anything; the kept ones are compared in order."""
    from compress.surgery.cut import cut

    teacher = tiny_gpt2()
    student = deepcopy(teacher)
    keep = {"hidden": [3, 4, *range(8, 30)], "layer.0.heads": [1, 3], "layer.1.heads": [0, 2]}
    cut(student, family_of(student.config), keep)
    side = Side(student, family_of(student.config), keep)
    batch = _batch(teacher, tiny_inputs)
    _, values = Objective(side, [CausalKV(), HiddenMSE()], teacher=_side(teacher))(batch)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    mask = batch["attention_mask"].bool()
    full, small = teacher(**inputs, use_cache=True), student(**inputs, use_cache=True)
    expected = []
    for layer, heads in ((0, [1, 3]), (1, [0, 2])):
        for part in ("keys", "values"):
            theirs = getattr(full.past_key_values.layers[layer], part)[:, heads].transpose(1, 2)[mask]
            ours = getattr(small.past_key_values.layers[layer], part).transpose(1, 2)[mask]
            expected.append(F.mse_loss(ours, theirs))
    torch.testing.assert_close(values["causal_kv"], 2 * torch.stack(expected).mean(), atol=1e-6, rtol=1e-5)


def test_the_bank_remembers_tokens_across_steps(tiny_gpt2, tiny_inputs):
    student, teacher = tiny_gpt2(seed=0), tiny_gpt2(seed=1)
    batch = _batch(student, tiny_inputs)
    objective = Objective(_side(student), [TokenContrastive(size=8, momentum=0.5)], teacher=_side(teacher)).train()
    bank = objective.parts["0"].bank
    objective(batch)
    seen = batch["input_ids"][batch["attention_mask"].bool()].unique()
    assert set(bank.abs().sum(-1).nonzero().flatten().tolist()) == set(seen.tolist())
    before = bank.clone()
    objective.eval()(batch)
    assert torch.equal(bank, before)
