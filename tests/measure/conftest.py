import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, GPT2Config

from compress.artifact import Artifact, adopt
from compress.data import Data, DataSpec, ModelInterface, open_data
from compress.models.families.bart import BART
from compress.models.families.gpt2 import GPT2
from compress.models.loading import build
from compress.models.scratch import train_bpe
from compress.onnx.export.exporter import export

LINES = ["the cat sat on the mat", "a dog ran far", "the cats and the dogs ate the food on the mat"]
ROWS = [
    {"question": "the cat?", "answer": "sat on", "other": "on the mat"},
    {"question": "a dog?", "answer": "ran far", "other": "ate"},
    {"question": "the cats and the dogs?", "answer": "ate the food", "other": "ran"},
]


def save(config: Any, tokenizer: Any, out: Path) -> Artifact:
    torch.manual_seed(0)
    model = build(config)
    for parameter in model.parameters():  # far from uniform predictions, so that a shifted label shows
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return adopt(out)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    tokenizer = train_bpe(LINES * 3, 270, GPT2)
    config = GPT2Config(
        n_embd=32, n_head=4, n_layer=2, n_positions=32, vocab_size=270, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return save(config, tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    tokenizer = train_bpe(LINES * 3, 270, BART)
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(
        d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, vocab_size=270,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, **sizes,
    )  # fmt: skip
    return save(config, tokenizer, tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="session")
def gpt2_onnx(gpt2: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same model in onnxruntime."""
    return exported(gpt2, tmp_path_factory.mktemp("gpt2-onnx"))


@pytest.fixture(scope="session")
def bart_onnx(bart: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same encoder and decoder in onnxruntime."""
    return exported(bart, tmp_path_factory.mktemp("bart-onnx"))


def exported(artifact: Artifact, out: Path) -> Artifact:
    artifact.config().save_pretrained(out)
    artifact.tokenizer().save_pretrained(out)
    export(artifact.model(), out)
    return Artifact(out, artifact.manifest.model_copy(update={"traits": ("onnx",)}))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "lines.txt").write_text("\n".join(LINES * 2) + "\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def data_of(artifact: Artifact, folder: Path, **written: Mapping[str, Any] | int) -> Data:
    tokenizer = artifact.tokenizer()
    interface = ModelInterface.of(artifact.config(), tokenizer)
    return open_data(DataSpec.model_validate(written), tokenizer=tokenizer, model=interface, base=folder)
