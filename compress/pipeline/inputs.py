"""The inputs of a run: the models a recipe names, opened or built, and the data as each model reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compress.artifact import Artifact, adopt, stock_state
from compress.data import Data, ModelInterface, open_data
from compress.data.corpus import read_corpus
from compress.data.dataset import tokenizer_digest
from compress.errors import DataError, ModelError, located
from compress.files import publish
from compress.models import family_of
from compress.models.loading import build, load_tokenizer
from compress.models.scratch import new_config, train_bpe
from compress.pipeline.keys import digest, identity, installed, key, stage_key
from compress.pipeline.workdir import Slot
from compress.problem import Problem
from compress.recipe import Recipe, TrainBpe
from compress.recipe.references import Link
from compress.stages.stage import Shape


class Inputs:
    """Opens each model and each view of the data once. New models are built only when :meth:`made` is called."""

    def __init__(self, recipe: Recipe, workdir: Path) -> None:
        self.recipe = recipe
        self.workdir = workdir
        self._models: dict[str, Artifact] = {}
        self._configs: dict[str, Any] = {}
        self._data: dict[str, Data] = {}
        self._tokenizers: dict[str, Any] = {}

    def model(self, name: str) -> Artifact | None:
        """Return the model, or None if it has not been built yet."""
        if name not in self._models:
            spec = self.recipe.models[name]
            with self._reported("models", name):
                given = None if spec.path is None else adopt(self._existing("path", spec.path))
                if found := given or self.finished(self.slot(name)):
                    self._models[name] = found
        return self._models.get(name)

    def made(self, name: str) -> Artifact:
        """Return the model. It is built now if it does not exist yet."""
        artifact = self.model(name)
        if artifact is None:
            with self._reported("models", name):
                artifact = self._models[name] = self._build(name)
        return artifact

    def config(self, name: str) -> Any:
        """Return the transformers config of a model, built or not. Raise an error if no model can have this config."""
        if name not in self._configs:
            artifact = self.model(name)
            with self._reported("models", name):
                config = artifact.config() if artifact else new_config(self._settings(name), self._tokenizer(name))
                with torch.device("meta"):
                    build(config)
            self._configs[name] = config
        return self._configs[name]

    def shape(self, name: str) -> Shape:
        """Return the properties of a model that are known before any work."""
        config, artifact = self.config(name), self.model(name)
        axes = family_of(config).axes(config)
        if artifact is None:
            return Shape(name, config, {axis.name: axis.size for axis in axes}, frozenset(), root=name)
        masks = artifact.masks() if "masked" in artifact.traits else {}
        spec = artifact.manifest.quantization
        return Shape(
            name,
            config,
            artifact.sizes(),
            artifact.traits,
            root=name,
            masked=tuple(dict.fromkeys(axis.kind for axis in axes if axis.name in masks)),
            scored=artifact.scored,
            layers=artifact.manifest.layers,
            activations=spec.activations if spec else None,
        )

    def data(self, name: str) -> Data | None:
        """Return the data as model ``name`` reads it. Models with the same tokenizer and interface share one view.

        None if the recipe has no data.
        """
        spec = self.recipe.data
        if spec is None:
            return None
        tokenizer = self.tokenizer(name)
        interface = ModelInterface.of(self.config(name), tokenizer)
        at = digest([str(interface), tokenizer_digest(tokenizer)])
        if at not in self._data:
            with self._reported():
                self._data[at] = open_data(spec, tokenizer=tokenizer, model=interface, base=self.recipe.base)
        return self._data[at]

    def tokenizer(self, name: str) -> Any:
        """Return the tokenizer of a model, built or not. None if it has none."""
        artifact = self.model(name)
        return artifact.tokenizer() if artifact else self._tokenizer(name)

    def slot(self, name: str) -> Slot:
        """Return the place of a model that is built from a config: ``00-NAME-<key>``."""
        parts = [self._settings(name), self.recipe.seed, self._tokenizer_content(name)]
        versions = {package: installed(package) for package in ("torch", "transformers", "tokenizers")}
        return Slot(self.workdir, 0, name, key(["model", *parts, versions]), proof="config.json")

    def stage_slot(self, item: Link, models: Mapping[str, Artifact]) -> Slot:
        """Return the place of a stage's result: ``NN-NAME-<key>``. ``models`` holds the artifacts it is made from."""
        data = self.data(item.root)
        hashes = {role: identity(models[name]) for role, name in item.inputs.items()}
        hashes["data"] = data.digest if data else ""
        return Slot(
            self.workdir, item.index + 1, item.name, stage_key(item.stage, seed=self.recipe.seed, inputs=hashes)
        )

    def finished(self, slot: Slot) -> Artifact | None:
        """Return the finished result in a slot, if there is one. A damaged result is an error that says what to do."""
        if slot.found is None:
            return None
        try:
            return adopt(slot.found)
        except ModelError as error:
            raise ModelError(f"{error.problem}; delete {slot.found.name} and run again") from None

    def _build(self, name: str) -> Artifact:
        slot, tokenizer, config = self.slot(name), self._tokenizer(name), self.config(name)
        torch.manual_seed(self.recipe.seed)
        model = build(config)
        out = slot.partial
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        config.save_pretrained(out)
        save_file(stock_state(model), out / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
        publish(out, slot.final, replace=True)
        return adopt(slot.final)

    def _settings(self, name: str) -> dict[str, Any]:
        given = self.recipe.models[name].config
        if isinstance(given, dict):
            return given
        path = self.recipe.base / str(given)
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(Problem(("config",), f"there is no file {path}")) from None
        except ValueError as error:
            raise ModelError(Problem(("config",), f"{path} is not JSON: {error}")) from None
        if not isinstance(settings, dict):
            raise ModelError(Problem(("config",), f"{path} does not contain a JSON object"))
        return settings

    def _tokenizer(self, name: str) -> Any:
        """Return the tokenizer of a model that has not been built yet. A new tokenizer is trained once."""
        if name not in self._tokenizers:
            self._tokenizers[name] = self._new_tokenizer(name)
        return self._tokenizers[name]

    def _new_tokenizer(self, name: str) -> Any:
        given = self.recipe.models[name].tokenizer
        if given is None:
            return None
        if isinstance(given, TrainBpe):
            corpus, family = self._corpus(), family_of(new_config(self._settings(name)))
            with located("tokenizer"):
                return train_bpe(corpus, given.train_bpe, family)
        tokenizer = load_tokenizer(self._existing("tokenizer", given))
        if tokenizer is None:
            raise ModelError(Problem(("tokenizer",), f"{given} has no tokenizer.json"))
        return tokenizer

    def _tokenizer_content(self, name: str) -> list[Any]:
        given = self.recipe.models[name].tokenizer
        if isinstance(given, TrainBpe):
            return [given.train_bpe, digest(self._corpus())]
        return [tokenizer_digest(self._tokenizer(name))]

    def _corpus(self) -> list[str]:
        spec = self.recipe.data
        if spec is None or spec.train is None:
            raise DataError(Problem(("tokenizer",), "train_bpe needs data.train"))
        with self._reported("data", "train"):
            return read_corpus(spec.train, spec.start(self.recipe.base))

    def _existing(self, field: str, path: str) -> str | Path:
        """Return a directory relative to the recipe. If there is none, the text itself, provided it can be a hub id."""
        here = self.recipe.base / Path(path).expanduser()
        if here.exists():
            return here
        if path.startswith(("/", ".", "~")) or path.count("/") > 1:
            raise ModelError(Problem((field,), f"there is no directory {here}"))
        return path

    @contextmanager
    def _reported(self, *path: str | int) -> Iterator[None]:
        """Turn errors about the value at ``path`` of the recipe, or inside that value, into errors of the recipe."""
        try:
            yield
        except (DataError, ModelError) as error:
            raise self.recipe.error(error.problem.inside(*path)) from error
