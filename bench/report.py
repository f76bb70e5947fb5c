"""What do the measurements say? Lines for the terminal, the targets met and missed, the table and plots of the docs."""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.measure import read_results
from bench.operations import operations
from errors import UserError

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
WIDTH = 100  # characters of a line of the page
DIRECTIONS = ("forward", "backward", "both")
# the first word of each provider's name, in the order of tables and legends
PROVIDERS = (
    "eager",
    "compile",
    "torch",
    "chunked",
    "base",
    "liger",
    "unsloth",
    "bitsandbytes",
    "peft",
    "sdpa",
    "chosen",
    "ours",
)

# ----------------------------------------------------------------------------------------------------------- one row


def milliseconds(value: float) -> str:
    return f"{1000 * value:.1f} µs" if value < 1 else f"{value:.2f} ms"


def worst_error(row: dict) -> str:
    """The largest relative error of outputs and gradients; what was not made or not finite comes first."""
    errors = row.get("errors", {})
    words = sorted({value for value in errors.values() if isinstance(value, str)})
    numbers = [value for value in errors.values() if not isinstance(value, str)]
    return ", ".join([*words, *([f"{max(numbers):.1e}"] if numbers else [])]) or "–"


def row_text(row: dict) -> str:
    """One row for the terminal."""
    parts = []
    for direction in DIRECTIONS:
        if timing := row.get(direction):
            share = f" ({timing['share']:.0%})" if "share" in timing else ""
            parts.append(f"{direction} {milliseconds(timing['ms'])}{share}")
    if last := row.get("both") or row.get("forward"):
        parts.append(f"wall {milliseconds(last['wall_ms'])}")
    if row.get("peak_mib") is not None:
        parts.append(f"peak {row['peak_mib']:.0f} MiB")
    if "errors" in row:
        parts.append(f"error {worst_error(row)}")
    parts += [f"{word}: {row[word]}" for word in ("failed", "skipped", "notes") if word in row]
    if (how := (row.get("both") or row.get("forward") or {}).get("how", "")).startswith("events"):
        parts.append(how)
    return ", ".join(parts)


# ----------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """value is None where it is not measured; it is met where value ≤ bound, or ≥ with at_least."""

    name: str
    value: float | None
    bound: float
    form: Callable[[float], str]
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if (self.value >= self.bound if self.at_least else self.value <= self.bound) else "MISSED"


def percent(value: float) -> str:
    return f"{value:.1%}"


def microseconds(value: float) -> str:
    return f"{1000 * value:.1f} µs"


def factor(value: float) -> str:
    return f"{value:.2f}x"


def targets(results: dict, steps: dict) -> list[Target]:
    """What is aimed at on an H100, against kernels.json (`results`) and step.json (`steps`)."""
    found = results.get("operations", {})

    def get(operation: str, size: str, provider: str, *keys: str) -> float | None:
        value = found.get(operation, {}).get(size, {}).get(provider, {})
        for key in keys:
            value = (value or {}).get(key)
        return value

    def sizes(operation: str) -> list[str]:
        return [size for size in found.get(operation, {}) if size != "tiny"] or ["8b"]

    listed = []
    for operation in ("rms_norm", "add_rms_norm", "swiglu", "rope", "nf4_dequantise"):
        for size in sizes(operation):
            for direction in ("forward",) if operation == "nf4_dequantise" else ("forward", "backward"):
                share = get(operation, size, "ours", direction, "share")
                name = f"{operation} {direction}, {size}: share of copy bandwidth"
                listed.append(Target(name, share, 0.85, percent, at_least=True))
    norm = get("add_rms_norm", "4096x4096", "ours", "backward", "ms")
    listed.append(Target("add_rms_norm backward, 4096 rows of 4096", norm, 0.060, microseconds))
    for size in ("124m", "1b", "8b"):
        whole = [
            (get("linear_cross_entropy", size, way, "both", "ms"), get("linear_cross_entropy", size, way, "peak_mib"))
            for way in ("eager", "compile")
        ]
        whole = [pair for pair in whole if None not in pair]
        ours = get("linear_cross_entropy", size, "ours", "both", "ms")
        peak = get("linear_cross_entropy", size, "ours", "peak_mib")
        fastest, its_peak = min(whole) if whole else (None, None)
        name = f"linear_cross_entropy, {size}, beside the fastest with whole logits"
        listed.append(Target(f"{name}: time", ours / fastest if ours and fastest else None, 1.08, factor))
        listed.append(Target(f"{name}: peak memory", peak / its_peak if peak and its_peak else None, 1 / 6, factor))
    for operation, way in (("lora_linear", "ours augmented"), ("norm_lora_linear", "ours")):
        for size in sizes(operation):
            ours, base = (get(operation, size, provider, "forward", "ms") for provider in (way, "base"))
            value = None if ours is None or base is None else ours / base
            listed.append(Target(f"{operation} {way}, {size}: time over the base's", value, 1.08, factor))
    ours, peer = (steps.get("qlora", {}).get("8b", {}).get(way, {}) for way in ("ours", "peft + bitsandbytes"))
    measured = "step_ms" in ours and "step_ms" in peer
    name = "QLoRA step of an 8B shape beside peft + bitsandbytes"
    speed = peer["step_ms"] / ours["step_ms"] if measured else None
    peak = ours["peak_gib"] / peer["peak_gib"] if measured and peer["peak_gib"] else None
    listed.append(Target(f"{name}: speed", speed, 2.0, factor, at_least=True))
    listed.append(Target(f"{name}: peak memory", peak, 0.60, factor))
    return listed


def targets_text(folder: Path) -> str:
    """Every target with the figure, one a line."""
    lines = []
    for target in targets(read_results(folder / "kernels.json"), read_results(folder / "step.json")):
        figure = "–" if target.value is None else target.form(target.value)
        sign = "≥" if target.at_least else "≤"
        lines.append(f"{target.verdict:<13}{figure:>10}  {sign} {target.form(target.bound):<9} {target.name}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- docs


def write_docs(page: Path, results_folder: Path) -> None:
    """Put the tables of all measured devices between the page's two markers, and draw their plots beside it."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{page} must hold the lines {BEGIN} and {END}; the tables go between them")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    parts = []
    for path in sorted(results_folder.glob("*/kernels.json")):
        results = read_results(path)
        image = page.parent / "images" / f"kernels_{path.parent.name}.png"
        parts += [*device_table(results, read_results(path.with_name("step.json"))), ""]
        if draw(results, image):
            parts += [f"![share of the ceiling on {path.parent.name}](images/{image.name})", ""]
    body = "\n".join(parts) or "Nothing has been measured yet.\n"
    page.write_text(f"{before}{BEGIN}\n{body}{END}{after}", encoding="utf-8")


def device_table(results: dict, steps: dict) -> Iterator[str]:
    """Markdown: what was measured with, then one table an operation, then the steps."""
    environment, ceilings = results["environment"], results["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    yield f"### {environment.get('device_name', environment['device'])}"
    yield ""
    driver = f", driver {environment['driver']}" if environment.get("driver") else ""
    sentences = [
        f"{versions}{driver}.",
        f"Ceilings: {ceilings['copy_gb_s']:.0f} GB/s (copy of {ceilings['copied']}), "
        f"{ceilings['product_tflop_s']:.1f} TFLOP/s (product {ceilings['multiplied']}).",
        "Times are the device's, by CUDA-graph replay. With * they are by events, where a provider cannot be captured. "
        "On a CPU they are by the wall clock. In brackets: the share of the ceiling.",
        "Wall is the same call from Python in eager mode.",
        "Error is the largest relative one of outputs and gradients against float64.",
    ]
    if "sdpa" in environment:
        taken = ", ".join(f"{name} (heads of {width})" for width, name in environment["sdpa"].items())
        sentences.append(f"SDPA takes {taken}.")
    yield textwrap.fill(" ".join(sentences), WIDTH, break_long_words=False, break_on_hyphens=False)
    for operation, sizes in in_order(results):
        yield from ["", f"**{operation}**", ""]
        yield "| size | provider | forward | backward | both | wall, both | peak | error |"
        yield "|---|---|---|---|---|---|---|---|"
        for size, rows in sizes.items():
            for provider, row in rows.items():
                yield f"| {size} | {provider} | " + " | ".join(_cells(row)) + " |"
    for name, sizes in results.get("sweeps", {}).items():
        yield from ["", f"**{name}**", "", "| size | value | time | peak |", "|---|---|---|---|"]
        for size, values in sizes.items():
            for value, row in sorted(values.items(), key=lambda item: int(item[0])):
                timing = row.get("backward") or row.get("both")
                time = milliseconds(timing["ms"]) if timing else row.get("failed", "–")
                yield f"| {size} | {value} | {time} | {_mebibytes(row)} |"
    for task, sizes in steps.items():
        if task == "environment":
            continue
        yield from ["", f"**A training step: {task}**", ""]
        yield "| size | provider | step | tokens/s | MFU | peak | loss | remark |"
        yield "|---|---|---|---|---|---|---|---|"
        for size, rows in sizes.items():
            for provider, row in rows.items():
                yield f"| {size} | {provider} | " + " | ".join(step_cells(row)) + " |"


def in_order(results: dict) -> Iterator[tuple[str, dict]]:
    """(operation, {size: {provider: row}}) of what is measured, in the order of operations.py; the file is sorted."""
    found = results.get("operations", {})

    def ordered(rows: dict, known: Iterable[str], key: Callable[[str], str] = str) -> dict:
        places = {name: place for place, name in enumerate(known)}
        return {name: rows[name] for name in sorted(rows, key=lambda name: (places.get(key(name), len(places)), name))}

    for operation in operations().values():
        if sizes := ordered(found.get(operation.name, {}), operation.sizes):
            first_word = lambda name: name.split()[0].rstrip(",")  # noqa: E731
            yield operation.name, {size: ordered(rows, PROVIDERS, first_word) for size, rows in sizes.items()}


def _cells(row: dict) -> list[str]:
    if reason := row.get("failed") or (row.get("skipped") if "forward" not in row else None):
        return [_short(reason), "", "", "", "", worst_error(row)]
    cells = []
    for direction in DIRECTIONS:
        timing = row.get(direction)
        cell = "–" if not timing else milliseconds(timing["ms"])
        cells.append(cell + (f" ({timing['share']:.0%})" if timing and "share" in timing else ""))
    last = row.get("both") or row["forward"]
    star = "*" if last["how"].startswith("events") else ""
    return [*cells[:2], cells[2] + star, milliseconds(last["wall_ms"]), _mebibytes(row), worst_error(row)]


def _short(reason: str) -> str:
    return textwrap.shorten(reason.replace("|", "/"), 40, placeholder=" …")


def _mebibytes(row: dict) -> str:
    return "–" if row.get("peak_mib") is None else f"{row['peak_mib']:,.0f} MiB"


def step_cells(row: dict) -> list[str]:
    """step, tokens/s, MFU, peak, loss, remark."""
    if reason := row.get("failed") or row.get("skipped"):
        return [_short(reason), "", "", "", "", ""]
    mfu = "n/a" if row.get("mfu") is None else f"{row['mfu']:.1%}"
    peak = f"{row['peak_gib']:.2f} GiB" if row.get("peak_gib") else "–"
    remark = row.get("remark", "")
    return [f"{row['step_ms']:.1f} ms", f"{row['tokens_s']:,.0f}", mfu, peak, f"{row['loss']:.4f}", remark]


def draw(results: dict, image: Path) -> bool:
    """A bar a provider for each operation and size: its share of the device's ceiling, forward and backward together."""
    measured = {
        operation: {size: _shares(rows) for size, rows in sizes.items() if _shares(rows)}
        for operation, sizes in in_order(results)
    }
    measured = {operation: sizes for operation, sizes in measured.items() if sizes}
    if not measured:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 2
    lines = -(-len(measured) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(12, 2.8 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(measured) :]:
        axis.set_visible(False)
    for axis, (operation, sizes) in zip(axes.flat, measured.items(), strict=False):
        providers = list(dict.fromkeys(provider for shares in sizes.values() for provider in shares))
        width = 0.8 / len(providers)
        firsts = [provider.split()[0].rstrip(",") for provider in providers]
        for number, provider in enumerate(providers):
            places = [place + (number - (len(providers) - 1) / 2) * width for place in range(len(sizes))]
            heights = [100 * shares.get(provider, 0.0) for shares in sizes.values()]
            color = plt.get_cmap("tab20")(PROVIDERS.index(firsts[number]))  # the same in every plot
            hatch = ("", "///", "xxx", "...")[firsts[:number].count(firsts[number])]
            axis.bar(places, heights, width, label=provider, color=color, hatch=hatch, edgecolor="white")
        axis.axhline(100, color="gray", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(sizes)), list(sizes))
        axis.set_title(operation, fontsize=10)
        axis.set_ylabel("% of the ceiling")
        axis.legend(fontsize=7)
    image.parent.mkdir(parents=True, exist_ok=True)
    # without the version of matplotlib, so that the same figures give the same file
    figure.savefig(image, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return True


def _shares(rows: dict) -> dict[str, float]:
    timings = {provider: row.get("both") or row.get("forward") or {} for provider, row in rows.items()}
    return {provider: timing["share"] for provider, timing in timings.items() if "share" in timing}
