"""Draw the dashboard's panels from a Prometheus server, without Grafana.

Usage: plot_board.py http://localhost:9090 board.png [--seconds 600]
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BOARD = Path(__file__).parent / "grafana" / "dashboards" / "sleb-serve.json"
_POINTS = 60


def panels(interval: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Return each panel's title and queries with legends, with Grafana's variables filled in."""
    for panel in json.loads(BOARD.read_text())["panels"]:
        queries = [
            (target["expr"].replace("$__rate_interval", interval), target["legendFormat"])
            for target in panel["targets"]
        ]
        yield panel["title"], queries


def ask(prometheus: str, path: str, **parameters: Any) -> list[dict[str, Any]]:
    """Return the result of a query."""
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{prometheus}/api/v1/{path}?{query}", timeout=30) as reply:
        result: list[dict[str, Any]] = json.load(reply)["data"]["result"]
    return result


def legend(text: str, labels: dict[str, str]) -> str:
    """Return Grafana's legend of a series."""
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def main() -> None:
    """Draw all panels into one image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prometheus")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=int, default=600)
    options = parser.parse_args()
    found = list(panels("20s"))
    rows = math.ceil(len(found) / 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(18, 4 * rows), layout="constrained")
    now = time.time()
    span = {"start": now - options.seconds, "end": now, "step": options.seconds / _POINTS}
    for axis, (title, queries) in zip(axes.flat, found, strict=False):
        for query, text in queries:
            for series in ask(options.prometheus, "query_range", query=query, **span):
                times = [at - now for at, _ in series["values"]]
                values = [float(value) for _, value in series["values"]]
                axis.plot(times, values, label=legend(text, series["metric"]))
        axis.set_title(title)
        axis.set_xlabel("seconds")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()
