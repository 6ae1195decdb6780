"""The results of the speed benchmark, as JSON values and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from metamom.experiments.shared.quartiles import short, shown, spread
from metamom.experiments.speed.measure import TOLERANCE, Measured
from metamom.experiments.speed.peers import ROUGH


def as_json(measured: Measured) -> dict[str, Any]:
    """A row's results, including every measured time.

    ``speed`` is a contender's against the reference's, the first contender's: the quotient of their times in the
    same round.
    """
    reference = next(iter(measured.differences), None)
    rate = gemm_rate(measured)
    contenders: dict[str, dict[str, Any]] = {}
    for name, difference in measured.differences.items():
        entry = contenders[name] = {
            "difference": difference,
            "agrees": name not in measured.refused,
        }
        if name in measured.first_calls:
            entry["float32_difference"] = measured.float32_differences[name]
            entry["first_call_seconds"] = measured.first_calls[name]
        if reference is not None and (times := measured.milliseconds.get(name)):
            against = np.divide(measured.milliseconds[reference], times)
            entry |= {"milliseconds": spread(times), "speed": spread(against), "all_milliseconds": times}
            if cpu := measured.cpu_milliseconds.get(name):
                entry["cpu_milliseconds"] = spread(cpu)
            if measured.flops is not None and rate is not None:
                gflops = measured.flops / (1e6 * float(np.median(times)))
                entry |= {"gflop_per_second": gflops, "percent_of_gemm": 100 * gflops / rate[1]}
        if (by_itself := measured.alone.get(name)) is not None:
            entry["memory_mib"] = {key: by_itself[key] for key in ("peak", "imports")}
            entry["second_first_call_seconds"] = by_itself["first_call"]
    return {
        "title": measured.row.title,
        "reference": reference,
        "tolerance": TOLERANCE,
        "float32_tolerance": measured.row.tolerance,
        "flops": measured.flops,
        "gemm_milliseconds": {str(size): spread(times) for size, times in measured.gemm.items()},
        "gemm_gflop_per_second": None if rate is None else rate[1],
        "contenders": contenders,
        "cannot_run": measured.failures,
    }


def gemm_rate(measured: Measured) -> tuple[int, float] | None:
    """Size and GFLOP/s of the product that ran at the higher rate, by its median time.

    A size that the machine happens to compute slowly would flatter all contenders.
    """
    rates = [(2e-6 * size**3 / float(np.median(times)), size) for size, times in measured.gemm.items() if times]
    if not rates:
        return None
    rate, size = max(rates)
    return size, rate


def timed(measured: Measured) -> Iterator[str]:
    """The lines of a row's table."""
    values = as_json(measured)
    yield measured.row.title
    yield from _failures(measured)
    if not measured.differences:
        return
    rounds = max(map(len, measured.milliseconds.values()), default=0)
    line = f"{rounds} rounds"
    if (rate := gemm_rate(measured)) is not None and measured.flops is not None:
        line += f"; {measured.flops / 1e9:.3g} GFLOP; {rate[0]}^3 GEMM at {rate[1]:.1f} GFLOP/s (100 %)"
    yield line
    against = f"x {values['reference']} (quartiles)"
    head = f"{'':<17}{'ms (quartiles)':>25}{'CPU ms':>8}{against:>29}"
    head += f"{'GFLOP/s':>9}{'GEMM':>8}{'off by':>9}{'1st call':>10}"
    yield head + (f"{'2nd run':>10}{'MiB (imports)':>15}" if measured.alone else "")
    for name, entry in values["contenders"].items():
        if not entry["agrees"]:
            off = f"{entry['difference']:.1e} in float64"
            if (rounded := entry.get("float32_difference")) is not None:
                off += f", {rounded:.1e} in float32"
            yield f"{name:<17}  not timed: its result is off by {off}"
            continue
        gflops, percent = entry.get("gflop_per_second"), entry.get("percent_of_gemm")
        cpu = entry.get("cpu_milliseconds")
        columns = [
            f"{name:<17}{shown(entry['milliseconds']):>25}{'-' if cpu is None else short(cpu['median']):>8}",
            f"{shown(entry['speed']):>29}",
            f"{'-' if gflops is None else format(gflops, '.2f'):>9}",
            f"{'-' if percent is None else format(percent, '.1f') + ' %':>8}",
            f"{entry['float32_difference']:>9.0e}{entry['first_call_seconds']:>8.2f} s",
        ]
        if (by_itself := measured.alone.get(name)) is not None:
            columns.append(f"{by_itself['first_call']:>8.2f} s")
            columns.append(f"{by_itself['peak']:>8.0f} ({by_itself['imports']:.0f})")
        yield "".join(columns)


def checked(measured: Measured) -> Iterator[str]:
    """The lines of a row's check."""
    yield measured.row.title
    yield from _failures(measured)
    if not measured.differences:
        return
    reference, *others = measured.differences
    if not others:
        yield f"{reference} alone: there is nothing to compare it with"
        return
    yield f"distance from {reference}'s, relative to its norm; in float64; up to {TOLERANCE:g} agrees"
    for name in others:
        verdict = "DISAGREES" if name in measured.refused else "rounds" if name in ROUGH else "agrees"
        yield f"  {name:<17}{measured.differences[name]:9.1e}  {verdict}"


def _failures(measured: Measured) -> Iterator[str]:
    for name, why in measured.failures.items():
        yield f"{name:<17}  cannot run this row: {' '.join(why.split())[:200]}"
