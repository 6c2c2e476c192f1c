"""One file per model family, and the list of them."""

from compress.models.families.bart import BART
from compress.models.families.gpt2 import GPT2
from compress.models.families.llama import LLAMA
from compress.models.families.mbart import MBART
from compress.models.family import ModelFamily

BUILT_IN: tuple[ModelFamily, ...] = (GPT2, BART, MBART, LLAMA)
