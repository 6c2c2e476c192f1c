"""What masks and quantization add to a distillation step, forward, backward and update, as JSON.

Every round takes one step of each kind in turn; a ratio is that of two steps of one round, and the median is reported.

Run: python benchmarks/training_step.py [--layers 6] [--hidden 256] [--batch 8] [--length 256] [--rounds 15]
"""

import argparse
import copy
import sys

import torch
from comparing import Parser, Step, at_least_two, conclude, medians, ratio, timed, whole
from torch import Tensor, nn
from transformers import GPT2Config

from compress.models import family_of
from compress.models.loading import build
from compress.surgery.masks import attach, masks_of
from compress.surgery.quantization import (
    ActivationQuantization,
    EmbeddingQuantization,
    Quantization,
    WeightQuantization,
    prepared,
    quantize,
    quantizer_parameters,
)
from compress.terms.logits import ForwardKL
from compress.terms.token_contrastive import TokenContrastive
from compress.training.config import Group, TrainConfig, parameter_groups
from compress.training.forward import Side
from compress.training.objective import Objective

BOUNDS = {"masked": 1.15, "quantized": 1.35}
"""What a step may cost at most, as a multiple of the plain step."""


def steps(options: argparse.Namespace) -> dict[str, Step]:
    """Three students of one teacher: as it is, with every axis masked, and at 2 bits with the contrastive term."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=options.vocabulary,
        n_positions=options.length,
        n_embd=options.hidden,
        n_layer=options.layers,
        n_head=max(1, options.hidden // 64),
        bos_token_id=0,
        eos_token_id=0,
    )
    teacher = build(config).to(options.device).requires_grad_(False)
    ids = torch.randint(config.vocab_size, (options.batch, options.length + 1), device=options.device)
    batch = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1]), "labels": ids[:, 1:]}

    plain, masked, quantized = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(3))
    family = family_of(config)
    weights = list(masked.parameters())
    attach(masked, family, ("hidden", "heads", "ffn"))
    quantize(
        quantized,
        family,
        Quantization(
            weights=WeightQuantization(bits=2),
            embedding=EmbeddingQuantization(bits=2),
            activations=ActivationQuantization(),
        ),
    )
    scales = quantizer_parameters(quantized)
    learned = {id(scale) for scale in scales}
    masters = [each for each in quantized.parameters() if id(each) not in learned]
    both = [ForwardKL(), TokenContrastive(weight=0.1)]
    return {
        "plain": step(plain, teacher, [ForwardKL()], {"weights": list(plain.parameters())}, batch),
        "masked": step(
            masked, teacher, [ForwardKL()], {"weights": weights, "masks": list(masks_of(masked).values())}, batch
        ),
        "quantized": step(quantized, teacher, both, {"weights": masters, "scales": scales}, batch),
    }


def step(
    student: nn.Module,
    teacher: nn.Module,
    terms: list[ForwardKL | TokenContrastive],
    groups: dict[Group, list[nn.Parameter]],
    batch: dict[str, Tensor],
) -> Step:
    """One step as ``compress.training.update`` takes it, in bf16 matrix products."""
    family = family_of(student.config)
    objective = Objective(Side(student, family), terms, teacher=Side(teacher, family), autocast=torch.bfloat16)
    objective.to(batch["labels"].device).train()
    config = TrainConfig(steps=1)
    built = parameter_groups({**groups, "projections": list(objective.parts.parameters())}, config)
    optimizer = torch.optim.AdamW(built, betas=config.betas, fused=True)
    parameters = [parameter for group in built for parameter in group["params"]]

    def run() -> None:
        with prepared(student, torch.bfloat16):
            total, _ = objective(batch)
            total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--layers", type=whole(1), default=6)
    parser.add_argument("--hidden", type=whole(1), default=256)
    parser.add_argument("--vocabulary", type=whole(1), default=8192)
    parser.add_argument("--length", type=whole(1), default=256)
    parser.add_argument("--batch", type=whole(1), default=8)
    parser.add_argument("--rounds", type=at_least_two, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    rounds = timed(steps(options), options.rounds, options.device)
    return conclude(
        {**vars(options), "precision": "bf16", "threads": torch.get_num_threads()},
        medians(rounds),
        ratios={name: ratio(rounds, name, "plain", bound) for name, bound in BOUNDS.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
