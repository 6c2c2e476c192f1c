"""The inside of a fresh process: open, decode once, print load time and peak memory as JSON."""

import json
import sys
import time
from collections.abc import Callable

from compress.measure.peak import peak_rss
from compress.measure.workload import Times, Workload


def report(opener: Callable[..., Callable[[Workload], Times]]) -> None:
    workload, *arguments = sys.argv[1:]
    start = time.perf_counter()
    run = opener(*arguments)
    load = time.perf_counter() - start
    run(Workload(**json.loads(workload)))
    print(json.dumps({"load_s": load, "peak_rss_bytes": peak_rss()}))
