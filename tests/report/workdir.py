"""A work directory as a finished run leaves it, with plausible figures and no model in it."""

import json
import math
import random
from pathlib import Path

MB = 2**20
PARAMETERS = 124_439_808
SOURCES = {
    "masks": "base",
    "pruned": "masks",
    "recovered": "pruned",
    "small": "recovered",
    "base-onnx": "base",
    "small-onnx": "small",
}
SHAPE = {"hidden": (768, 512), "heads": (12, 8), "ffn": (3072, 2048)}


def write_run(
    workdir: Path, *, measure: frozenset[str] = frozenset({"size", "quality", "speed"}), trained: bool = True
) -> Path:
    """Write a whole run of prune, distill, quantize and two exports; ``measure`` says what was measured of it.

    Without ``trained``, no stage left a training curve or details.
    """
    workdir.mkdir(parents=True)
    chance = random.Random(0)
    kept = _kept(chance)
    lineage: list[dict] = []
    stages = []
    plan = [
        ("masks", "learn_masks", ("masked",), 812.4),
        ("pruned", "prune", ("pruned",), 3.1),
        ("recovered", "distill", ("pruned",), 2961.0),
        ("small", "quantize", ("pruned", "quantized"), 4420.8),
        ("base-onnx", "export_onnx", ("onnx",), 31.0),
        ("small-onnx", "export_onnx", ("pruned", "quantized", "onnx"), 22.5),
    ]
    for at, (name, kind, traits, seconds) in enumerate(plan):
        directory = workdir / f"{at + 1:02d}-{name}-{chance.getrandbits(48):012x}"
        directory.mkdir()
        step = _step(name, kind, seconds, SOURCES[name])
        lineage = [step] if name == "base-onnx" else [*[s for s in lineage if s["stage"] != "base-onnx"], step]
        if name == "small-onnx":
            lineage = [_step(n, k, s, SOURCES[n]) for n, k, _, s in plan[:4]] + [step]
        manifest = {
            "format": 1,
            "family": "gpt2",
            "task": "causal",
            "traits": traits,
            "root": "5d" * 32,
            "sizes": _sizes(),
            "kept": kept if "pruned" in traits else {},
            "quantization": _spec() if "quantized" in traits else None,
            "lineage": lineage,
            "files": {},
            "digest": f"{chance.getrandbits(256):064x}",
        }
        _json(directory / "artifact.json", manifest)
        if trained and kind in ("learn_masks", "distill", "quantize"):
            _history(directory / "history.jsonl", kind, chance)
        if trained and kind == "quantize":
            _json(directory / "details.json", {"histograms": _histograms(chance)})
        stages.append({"name": name, "type": kind, "path": directory.name, "seconds": seconds, "reused": at == 0})
    environment = {
        "processor": "Example CPU @ 2.45 GHz",
        "cores": 2,
        "memory_bytes": 2**34,
        "threads": 2,
        "device": "cpu",
        "python": "3.11.7",
        "torch": "2.13.0",
    }
    run = {
        "recipe": {"version": 1, "name": "gpt2-ptb-25x"},
        "seed": 0,
        "stages": stages,
        "models": {"base": "gpt2"} | {stage["name"]: stage["path"] for stage in stages if stage["name"] != "masks"},
        "keys": {name: f"key of {name}" for name in ("base", *SOURCES) if name != "masks"},
        "environment": environment,
    }
    _json(workdir / "run.json", run)
    _json(
        workdir / "measurements.json",
        {
            "artifacts": _records(measure),
            "environment": environment,
            "conditions": [{"type": kind, "of": "all"} for kind in sorted(measure)],
        },
    )
    return workdir


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _sizes() -> dict[str, int]:
    layers = {f"layer.{n}.{kind}": SHAPE[kind][0] for n in range(12) for kind in ("heads", "ffn")}
    return {"hidden": 768, **layers}


def _kept(chance: random.Random) -> dict[str, list[int]]:
    return {axis: sorted(chance.sample(range(n), SHAPE[axis.split(".")[-1]][1])) for axis, n in _sizes().items()}


def _spec() -> dict:
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    matrices = [
        {
            "module": f"transformer.h.{n}.{name}",
            "bits": 2,
            "granularity": "tensor",
            "block": 128,
            "activations": "block",
        }
        for n in range(12)
        for name in names
    ]
    return {"matrices": matrices}


def _step(name: str, kind: str, seconds: float, source: str) -> dict:
    before, after = {"prune": (474.7, 244.5), "quantize": (244.5, 17.9)}.get(kind, (244.5, 244.5))
    return {
        "stage": name,
        "type": kind,
        "version": 1,
        "config": {"source": source, "teacher": "base" if kind in ("distill", "quantize") else None},
        "seed": 0,
        "inputs": {"source": "ab" * 32},
        "packages": {"torch": "2.13.0"},
        "seconds": seconds,
        "coverage": {
            "modules_touched": 49,
            "modules_total": 50,
            "parameters_touched": 123_532_032,
            "parameters_total": PARAMETERS,
            "bytes_before": int(before * MB),
            "bytes_after": int(after * MB),
            "note": "",
        },
        "metrics": {"eval_nll": 4.05, "tokens_per_s": 2310.0, "steps": 2000} if kind == "distill" else {},
    }


def _history(path: Path, kind: str, chance: random.Random) -> None:
    terms = {
        "learn_masks": {"forward_kl": 0.6, "mask_l1": 3.0},
        "distill": {"adaptive_kl": 1.9, "causal_kv": 0.5},
        "quantize": {"forward_kl": 2.4, "token_contrastive": 4.0},
    }[kind]
    lines = []
    for step in range(10, 2001, 10):
        values = {n: s * (0.15 + math.exp(-step / 350)) * chance.uniform(0.93, 1.07) for n, s in terms.items()}
        lines.append({"step": step, "loss": sum(values.values()), "terms": values, "lr": 1e-4, "tokens_per_s": 2300})
        if step % 250 == 0:
            lines.append({"step": step, "eval_nll": 4.05 + 1.2 * math.exp(-step / 400) + (step > 1700) * 0.02})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _histograms(chance: random.Random) -> list[dict]:
    found = []
    for matrix in _spec()["matrices"]:
        width = chance.uniform(0.2, 0.6)
        edges = [width * (at / 20 - 1) for at in range(41)]
        counts = [round(1e4 * math.exp(-0.5 * ((left / width) * 4) ** 2)) for left in edges[:-1]]
        found.append({"module": matrix["module"], "edges": edges, "counts": counts, "clip": 0.55 * width})
    return found


def _records(measure: frozenset[str]) -> list[dict]:
    table = [  # name, parameters, MB, perplexity, ms per token, prefill ms
        ("base", PARAMETERS, 474.7, 54.88, 29.5, 222.0),
        ("pruned", 64_085_504, 244.5, 311.4, None, None),
        ("recovered", 64_085_504, 244.5, 55.91, 16.1, 120.0),
        ("small", 64_085_504, 17.9, 58.02, None, None),
        ("base-onnx", PARAMETERS, 475.1, 54.88, 11.7, 84.0),
        ("small-onnx", 64_085_504, 18.2, 58.02, 0.71, 33.2),
    ]
    return [_record(*line, measure=measure) for line in table]


def _record(
    name: str,
    parameters: int,
    size: float,
    perplexity: float,
    token: float | None,
    prefill: float | None,
    *,
    measure: frozenset[str],
) -> dict:
    record: dict = {"name": name, "path": name, "key": f"key of {name}"}
    if "size" in measure:
        ratio = 4 * PARAMETERS / (size * MB)
        record |= {"parameters": parameters, "bytes": int(size * MB), "bytes_total": int(size * MB) + 4096}
        record |= {"compression_ratio": ratio, "compression_ratio_fp16": ratio / 2}
    if "quality" in measure:
        record["quality"] = {
            "perplexity": perplexity,
            "word_perplexity": perplexity**1.196,
            "context": 256,
            "stride": 256,
        }
        record["quality"]["samples"] = [{"input": "the company said", "output": "it expects a loss for the year"}]
        runtime = "onnxruntime" if name.endswith("onnx") else "torch"
        record["conditions"] = {"quality": {"split": "test", "batch": 8, "runtime": runtime}}
    if "speed" in measure and token is not None and prefill is not None:
        record["speed"] = {
            "prefill_ms": {"p50": prefill, "p95": prefill * 1.06},
            "per_token_ms": {"p50": token, "p95": token * 1.11},
            "tokens_per_s": 1000 / token,
            "load_s": size / 400,
            "peak_rss_bytes": int((180 + 2.3 * size) * MB),
        }
        how = {"device": "cpu", "threads": 2, "prompt_tokens": 64, "new_tokens": 64, "batch": 1, "repeats": 20}
        record.setdefault("conditions", {})["speed"] = how
    return record
