"""mBART: BART with normalization before each block and after each stack."""

from dataclasses import replace

from compress.models.families.bart import BART, DECODER, ENCODER

MBART = replace(
    BART,
    name="mbart",
    model_types=("mbart",),
    pre_norm=True,
    stacks=(
        replace(ENCODER, final_norm="model.encoder.layer_norm"),
        replace(DECODER, final_norm="model.decoder.layer_norm"),
    ),
)
