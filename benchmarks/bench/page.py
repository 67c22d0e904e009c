"""The Markdown page of a measurement."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.bench.growth import Times, exponent
from catp_lightning.utils.markdown import markdown_table

MIB = 2**20


def page(found: Mapping[str, Any]) -> str:
    """Return the Markdown page of what was measured so far."""
    about = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    return "\n".join(
        [f"{found['shape']}: {about}\n", *(told(found[name]) for name, told in TABLES.items() if name in found)]
    )


def _interval(values: Sequence[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*values)


def _floor(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["tokens", "batch", "keep", "method", "ms", "of unpruned", "over floor", "choosing, of unpruned"]
    table = [
        [
            *(str(row[name]) for name in ("tokens", "batch", "keep", "method")),
            f"{1000 * row['pruned_s']:.4g}",
            f"{row['over_plain'][0]:.3f}",
            _interval(row["over_floor"]),
            f"{row['choosing_share'][0]:.2%}",
            f"{row['flops_share']:.3f}",
            str(row["rounds"]),
        ]
        for row in rows
    ]
    return "Prefill, choosing included, over floor runs:\n\n" + markdown_table([*header, "FLOPs", "pairs"], table)


def _left_out(names: Mapping[str, str]) -> str:
    return "Not measured:\n\n" + "".join(f"- {name}: {why}\n" for name, why in names.items())


def _parts(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["", "vision, ms", "choosing, ms", "prefill, ms", "a step, ms", "vision", "prefill", "a step", "call"]
    table = [
        [
            row["case"],
            *(f"{1000 * row['seconds'][part]:.4g}" for part in ("vision", "choosing", "reading", "step")),
            *(_interval(row["over_plain"][part]) for part in ("vision", "reading", "step", "call")),
            f"{row['peak_bytes'] / MIB:.0f}",
            f"{row['cache_bytes'] / MIB:.1f}",
        ]
        for row in rows
    ]
    about = "Parts of a call, 1/4 of the tokens; the last columns of times are ratios to the unpruned call:\n\n"
    return about + markdown_table([*header, "peak memory, MiB", "cache, MiB"], table)


def _families(found: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {_parts(rows)}" for name, rows in found.items())


def _observing(found: Mapping[str, Any]) -> str:
    header = ["what is observed", "", "vision, ms", "of the plain tower"]
    table = [
        [name, row["case"], f"{1000 * row['seconds']['vision']:.4g}", _interval(row["over_plain"]["vision"])]
        for name, rows in found.items()
        for row in rows
    ]
    return "Vision, observed:\n\n" + markdown_table(header, table)


def _requests(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["requests at once", "", "requests a second", "of unpruned"]
    table = [[str(row["concurrent"]), row["case"], f"{row['a_second']:.3g}", _interval(row["gain"])] for row in rows]
    return "Requests a second, in batches:\n\n" + markdown_table(header, table)


def _largest(batches: Mapping[str, int]) -> str:
    told = [[name, str(most)] for name, most in batches.items()]
    return "Largest batch that fits, a power of two:\n\n" + markdown_table(["", "samples"], told)


def _growth(found: Mapping[str, Any]) -> str:
    tables = ["Seconds of one choice of 1/4 of the tokens:\n\n" + _grown("tokens", found["choosing"])]
    for varied, times in found["over"].items():
        title = TITLES.get(varied, f"a prefill over {varied}")
        tables.append(f"Seconds, {title}:\n\n" + _grown(varied, times))
    return "\n".join(tables)


TITLES = {"calibration": "a whole calibration over questions"}


def _grown(varied: str, times: Times) -> str:
    sizes = [str(size) for size, _ in next(iter(times.values()))]
    table = [
        [name, *(f"{seconds:.3g}" for _, seconds in points), f"{exponent(points):.2f}"]
        for name, points in times.items()
    ]
    return markdown_table([varied, *sizes, "exponent at the end"], table)


TABLES: dict[str, Callable[[Any], str]] = {
    "floor": _floor,
    "left_out": _left_out,
    "parts": _parts,
    "observing": _observing,
    "requests": _requests,
    "largest_batch": _largest,
    "growth": _growth,
    "families": _families,
}
