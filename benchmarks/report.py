"""Writes the tables, the plot and the README's part from the JSON files in results/.

    python -m benchmarks report [--results FOLDER] [--readme FILE]

Ratios are of medians; above 1 means that the row is faster. Percentages are of ceilings measured in the same run with
the same threads: for FLOP/s a matrix product, on a GPU in the row's precision; for bytes a large copy, which data in
caches may exceed. The roofline is the larger of the two. The whole pair's bytes are the minimum of a step in which
every block is one kernel (`vaebm_fast.evaluation.cost`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS
from benchmarks.gate import REPOSITORY
from benchmarks.results_file import Row
from vaebm_fast.runtime.files import expanded, replacing, write

README = REPOSITORY / "README.md"
BEGIN, END = "<!-- benchmarks: begin, written by python -m benchmarks report -->", "<!-- benchmarks: end -->"
PLAIN, NHWC, REFERENCE = "plain", "plain NHWC", "reference"

Columns = dict[str, Callable[[Row], str]]


def derived(content: dict[str, Any]) -> list[Row]:
    """The rows with rates, ratios over the baselines of the same case (None if missing) and shares of the ceilings."""
    rows, ceilings = content["results"], content["ceilings"]
    medians_s = {(_case(row), row["candidate"]): row["median_s"] for row in rows}

    def ratio(row: Row, baseline: str) -> float | None:
        base_s = medians_s.get((_case(row), baseline))
        return None if base_s is None else base_s / row["median_s"]

    result = []
    for row in rows:
        gflops = row["flops"] / row["median_s"] * 1e-9
        gbps = row.get("bytes", 0) / row["median_s"] * 1e-9
        matrix_share, copy_share = gflops / _matrix_ceiling(row, ceilings), gbps / ceilings["copy_gbps"]
        result.append(
            row
            | {f"over {baseline}": ratio(row, baseline) for baseline in (PLAIN, NHWC, REFERENCE)}
            | {"gflops": gflops, "matrix_share": matrix_share, "gbps": gbps, "copy_share": copy_share}
            | {"roofline_share": max(matrix_share, copy_share)}
        )
    return result


def _matrix_ceiling(row: Row, ceilings: dict[str, float]) -> float:
    """GFLOP/s of a matrix product in the row's precision, or in float32 if that was not measured."""
    products = str(row.get("products") or {"bfloat16": "bf16"}.get(row.get("dtype", ""), "float32"))
    key = "matrix_gflops" if products == "float32" else f"matrix_gflops_{products.split()[0]}"
    return ceilings.get(key, ceilings["matrix_gflops"])


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("preset", "batch", "op", "shape"))


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _per_image(row: Row, key: str) -> str:
    return _digits(row[key] / row["batch"])


def _digits(value: float) -> str:
    """Three decimals, or three significant digits for small numbers."""
    return f"{value:.3f}" if value >= 0.05 else f"{value:.3g}"


def _what_runs(row: Row) -> str:
    """The candidate, with how it was launched unless eagerly."""
    launched = row.get("launched", "eager")
    return str(row["candidate"]) if launched == "eager" else f"{row['candidate']} ({launched})"


PAIR: Columns = {
    "preset, N": lambda row: f"{row['preset']}, {row['batch']}",
    "what runs": _what_runs,
    "s/image/step": lambda row: _per_image(row, "median_s"),
    "p20 - p80": lambda row: f"{_per_image(row, 'p20_s')} - {_per_image(row, 'p80_s')}",
    "x plain": lambda row: _or_dash(row[f"over {PLAIN}"], ".2f"),
    "x plain NHWC": lambda row: _or_dash(row[f"over {NHWC}"], ".2f"),
    "GFLOP/s": lambda row: f"{row['gflops']:.0f}",
    "% of ceiling": lambda row: f"{100 * row['matrix_share']:.0f}",
    "% of roofline": lambda row: f"{100 * row['roofline_share']:.0f}" if "bytes" in row else "-",
    "peak MiB": lambda row: _or_dash(row["peak_memory_mib"], ".0f"),
    "rounds": lambda row: str(row["rounds"]),
    "products": lambda row: str(row.get("products", row["dtype"])),
    "MiB before": lambda row: _or_dash(row["memory_before_mib"], ".0f"),
    "user s": lambda row: f"{row['user_s']:.2f}",
    "system s": lambda row: f"{row['system_s']:.2f}",
    "page faults": lambda row: f"{row['page_faults']:.0f}",
    "s to compile": lambda row: _or_dash(row["compile_s"], ".0f"),
}
OPS: Columns = {
    "op": lambda row: str(row["op"]),
    "shape": lambda row: str(row["shape"]),
    "backend": lambda row: str(row["backend"]),
    "ms": lambda row: _digits(1e3 * row["median_s"]),
    "p20 - p80": lambda row: f"{_digits(1e3 * row['p20_s'])} - {_digits(1e3 * row['p80_s'])}",
    "x reference": lambda row: _or_dash(row[f"over {REFERENCE}"], ".2f"),
    "GB/s": lambda row: f"{row['gbps']:.1f}",
    "% of copy": lambda row: f"{100 * row['copy_share']:.0f}",
    "GFLOP/s": lambda row: f"{row['gflops']:.0f}",
    "% of matrix product": lambda row: f"{100 * row['matrix_share']:.0f}",
    "% of roofline": lambda row: f"{100 * row['roofline_share']:.0f}",
    "user ms": lambda row: f"{1e3 * row['user_s']:.2f}",
    "system ms": lambda row: f"{1e3 * row['system_s']:.2f}",
    "rounds": lambda row: str(row["rounds"]),
}
CHAIN: Columns = {
    "preset": lambda row: str(row["preset"]),
    "N x blocks": lambda row: f"{row['batch']} x {row['blocks']}",
    "steps": lambda row: str(row["steps"]),
    "candidate": _what_runs,
    "s": lambda row: f"{row['median_s']:.2f} ({row['p20_s']:.2f} - {row['p80_s']:.2f})",
    "images/s": lambda row: f"{row['images_per_second']:.3g}",
    "ms/image/step": lambda row: _digits(1e3 / row["images_per_second"] / row["steps"]) if row["steps"] else "-",
    "of the bare chain": lambda row: _or_dash(row["over_bare_chain"], ".1%"),
}

TRAINING: Columns = {
    "preset, N": lambda row: f"{row['preset']}, {row['batch']}",
    "stage": lambda row: str(row["stage"]),
    "what runs": _what_runs,
    "s/iteration": lambda row: f"{_digits(row['median_s'])} ({_digits(row['p20_s'])} - {_digits(row['p80_s'])})",
    "images/s": lambda row: f"{row['batch'] / row['median_s']:.3g}",
    "x plain": lambda row: f"{row['over plain']:.2f}",
    "rounds": lambda row: str(row["rounds"]),
}
LOADERS: Columns = {
    "source": lambda row: f"{row['source']}, {row['side']} x {row['side']}",
    "reader": lambda row: str(row["candidate"]),
    "workers": lambda row: str(row["workers"] or "-"),
    "N": lambda row: str(row["batch"]),
    "images/s": lambda row: f"{row['read_images_per_second']:,.0f}",
    "x DataLoader": lambda row: _or_dash(row["over DataLoader"], ".2f"),
    "waits": lambda row: _or_dash(row["waiting_share"], ".2%"),
    "rounds": lambda row: str(row["rounds"]),
}


def markdown(rows: Sequence[Row], columns: Columns) -> str:
    """A Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_case(rows: Sequence[Row]) -> str:
    """A line per preset and N: ms per image and step of every candidate, and the ratios of the fastest frozen one."""
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    cases: dict[tuple[str, int], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (row["preset"], row["batch"])):
        cases.setdefault((row["preset"], row["batch"]), {})[row["candidate"]] = row
    head = ["preset, N", *candidates, f"x {PLAIN}", f"x {NHWC}", "% of ceiling"]
    lines = [head, ["---"] * len(head)]
    for (preset, batch), found in cases.items():
        times = [f"{1e3 * found[name]['median_s'] / batch:,.0f}" if name in found else "-" for name in candidates]
        frozen = [row for name, row in found.items() if name.startswith("frozen")]
        gains = ["-"] * 3
        if frozen:
            best = min(frozen, key=lambda row: row["median_s"])
            gains = [_or_dash(best[f"over {baseline}"], ".1f") for baseline in (PLAIN, NHWC)]
            gains.append(f"{100 * best['matrix_share']:.0f}")
        lines.append([f"{preset}, {batch}", *times, *gains])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(content: dict[str, Any]) -> str:
    """One paragraph with the environment and the ceilings, then a line per refused figure."""
    facts = ", ".join(f"{name} {value}" for name, value in content["environment"].items())
    ceilings = content["ceilings"]
    reach = (
        f"Ceilings of the same run: matrix product {_products(ceilings)}, copy {ceilings['copy_gbps']:.1f} GB/s. "
        if ceilings
        else ""
    )
    lines = [f"{reach}{facts}."]
    if content.get("red"):
        lines.append(f"Red in the same run: {', '.join(content['red'])}.")
    lines += [f"No figure for {entry['what']}: {entry['reason'].splitlines()[0]}" for entry in content["refused"]]
    return "\n\n".join(lines)


def _products(ceilings: dict[str, float]) -> str:
    """The matrix product's rates, float32 first."""
    rates = {key.removeprefix("matrix_gflops").lstrip("_"): value for key, value in ceilings.items() if "matrix" in key}
    return ", ".join(f"{rate:.0f} GFLOP/s{f' in {name}' if name else ''}" for name, rate in rates.items())


def table(content: dict[str, Any]) -> str:
    """The table of a result file with all columns, and its environment."""
    for key, columns in (("images_per_second", CHAIN), ("stage", TRAINING), ("source", LOADERS)):
        if any(key in row for row in content["results"]):
            return f"{content['question']}\n\n{markdown(content['results'], columns)}\n\n{describe(content)}\n"
    rows = derived(content)
    columns = PAIR if any("preset" in row for row in rows) else OPS
    return f"{content['question']}\n\n{markdown(rows, columns)}\n\n{describe(content)}\n"


def write_table(path: Path) -> str:
    """Write the table of the result file at `path` beside it, with suffix .md; returns the table."""
    text = table(json.loads(path.read_text()))
    write(path.with_suffix(".md"), text)
    return text


def plot(content: dict[str, Any], path: Path) -> None:
    """Bars of the ratio over the plain modules, a group per case and a colour per candidate, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in derived(content) if row[f"over {PLAIN}"] is not None]
    cases = list(dict.fromkeys((row["preset"], row["batch"]) for row in rows))
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    width = 0.8 / max(len(candidates), 1)
    figure, axis = plt.subplots(figsize=(1.6 + 1.2 * len(cases), 3.2), layout="constrained")
    for index, candidate in enumerate(candidates):
        bars = [row for row in rows if row["candidate"] == candidate]
        places = [cases.index((row["preset"], row["batch"])) + (index + 0.5) * width - 0.4 for row in bars]
        axis.bar(places, [row[f"over {PLAIN}"] for row in bars], 0.95 * width, label=candidate)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(cases)), [f"{preset}\nN = {batch}" for preset, batch in cases])
    axis.set_ylabel("chain steps per second,\nplain modules = 1")
    axis.legend(fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def rewrite(readme: Path, block: str) -> None:
    """Put `block` between the two marker lines of the file. Raises ValueError unless each occurs once, in order."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} needs the line {BEGIN!r} once, and after it {END!r} once.")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    write(readme, f"{before}{BEGIN}\n{block}\n{after}")


def main(arguments: Sequence[str]) -> None:
    """Write every result file's table, the plot, and the README's part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=expanded, default=RESULTS, help="folder with what `make bench` wrote")
    parser.add_argument("--readme", type=expanded, default=README, help="file with the two marker lines")
    options = parser.parse_args(arguments)
    paths = sorted(path for path in options.results.glob("*.json") if path.name != "gpu_run.json")
    if not paths:
        parser.error(f"{options.results} holds no results; `make bench` writes them.")
    blocks = []
    for path in paths:
        write_table(path)
        content = json.loads(path.read_text())
        if path.name == "pair_cpu.json" and content["results"]:  # the README's GPU table is written by hand
            picture = path.with_suffix(".png")
            plot(content, picture)
            shown = Path("benchmarks", "results", picture.name)
            blocks.append(
                f"![Speed over the plain modules]({shown})\n\n{by_case(derived(content))}\n\n"
                "Milliseconds per image and step; ratios and percentages are of the faster frozen pair. "
                f"{describe(content)} [All figures]({shown.with_suffix('.md')})."
            )
    rewrite(options.readme, "\n\n".join(blocks))
