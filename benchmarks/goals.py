"""The goals of deployed models, by model, kind of figure and contender; ``deployment.py`` checks them."""

AT_MOST = frozenset({"megabytes", "above_floor", "peak_memory", "export_seconds"})
"""Kinds of figures that may not be higher; the others may not be lower."""

GOALS: dict[str, dict[str, dict[str, float]]] = {
    "gpt2": {
        "megabytes": {"2-2-8": 33.5, "4-4-8": 63.5, "8-8-8": 122.5},
        "smaller": {"8of12-2-2-8": 25},
        "decode_than_optimum": {
            "8-8-8": 3.8,
            "4-4-8": 5.8,
            "2-2-8": 7.5,
            "6of12-float": 2.5,
            "8of12-2-2-8": 17,
            "6of12-2-2-8": 22,
        },
        "decode_than_stock_int8": {"2-2-8": 2.7},
        "decode_than_ctranslate2": {"2-2-8": 6},
        "decode_than_llama": {"2-2-8": 1},
        "prefill_than_optimum": {"8-8-8": 1, "4-4-8": 1, "2-2-8": 1},
        "above_floor": {"2-2-8": 2},
        "peak_memory": {"2-2-8": 1 / 3},
        "export_seconds": {"float": 60, "8-8-8": 60, "4-4-8": 60, "2-2-8": 60},
    },
    "bart": {
        "megabytes": {"2-2-8": 40.5, "4-4-8": 73.5, "8-8-8": 139.5},
        "smaller": {"8of12-2-2-8": 25},
        "generate_than_optimum": {"8-8-8": 2.5, "4-4-8": 4, "2-2-8": 5, "6of12-float": 2.5, "8of12-2-2-8": 9},
        "generate_than_stock_int8": {"2-2-8": 2.5},
        "generate_than_ctranslate2": {"2-2-8": 3},
        "generate_than_torch": {"6of12-float": 6.96},
        "prefill_than_optimum": {"8-8-8": 1, "4-4-8": 1, "2-2-8": 1},
        "peak_memory": {"2-2-8": 1 / 3},
        "export_seconds": {"float": 60, "8-8-8": 60, "4-4-8": 60, "2-2-8": 60},
    },
}
"""``megabytes`` of 2^20 bytes of model files; ``smaller``: 4 bytes x parameters of the whole model / bytes;
``*_than_*``: how many times as fast (``stock_int8`` and ``llama``: as the fastest of them); ``above_floor``: time of a
token / time in which memory gives its weights; ``peak_memory``: in parts of optimum's float32 graph;
``export_seconds``: packing and writing, without the check."""

CUT_ON_GPU = {"6of12": 1.51}
"""How many times as fast as the whole model a cut one decodes on a GPU: in torch, at each batch size."""
