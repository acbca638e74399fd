"""What the figures' results look like on a pair of axes, by figure: `bench.plots` makes pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Draw = Callable[[Any, Mapping[str, Any]], None]


def _bars(axes: Any, values: Mapping[str, float], label: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color="tab:blue")
    axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.12)


def _stacks(axes: Any, stages: Mapping[str, Mapping[str, float]]) -> None:
    """A bar for each way to start, of its stages' seconds."""
    done = dict.fromkeys(stages, 0.0)
    for stage in dict.fromkeys(stage for one in stages.values() for stage in one):
        spent = {who: one.get(stage, 0.0) for who, one in stages.items()}
        if not any(spent.values()):
            continue
        label = stage.removesuffix("_s").replace("_", " ")
        axes.barh(list(spent), list(spent.values()), left=list(done.values()), label=label)
        done = {who: done[who] + spent[who] for who in stages}
    axes.invert_yaxis()
    axes.set_xlabel("seconds from process start to the first picture")
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def _goal(axes: Any, value: float) -> None:
    axes.axvline(value, color="tab:red", linestyle="--", label=f"goal {value:.3g}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)


def _whole_request(axes: Any, result: Mapping[str, Any]) -> None:
    counts = sorted(result["request_s"], key=int)
    seconds = [result["request_s"][count] for count in counts]
    medians = [one["median"] for one in seconds]
    reach = [[one["median"] - one["min"] for one in seconds], [one["max"] - one["median"] for one in seconds]]
    bars = axes.bar([f"{count} LoRAs" for count in counts], medians, yerr=reach, capsize=4, color="tab:blue")
    ratios = ["plain", *(f"x {result['ratio'][count]['median']:.3f}" for count in counts[1:])]
    axes.bar_label(bars, labels=ratios, label_type="center", color="white")
    axes.set_ylabel("seconds of a request")


def _handler(axes: Any, result: Mapping[str, Any]) -> None:
    stages = {name: spent for name, spent in result["stages_ms"].items() if name not in ("denoising", "total")}
    _bars(axes, stages, f"ms beside the denoising of {result['stages_ms']['denoising']:.0f} ms")


def _memory(axes: Any, result: Mapping[str, Any]) -> None:
    _bars(axes, {name: peak / 2**30 for name, peak in result["peak_bytes"].items()}, "peak, GiB")
    axes.axvline(result["weights_bytes"] / 2**30, color="0.4", linestyle=":", label="weights alone")
    axes.legend(loc="lower right", fontsize=9)


def _switching(axes: Any, result: Mapping[str, Any]) -> None:
    counts = sorted(result["loras"], key=int)
    for who in ("ours", "stock"):
        times = [result["loras"][count][who] for count in counts]
        axes.plot(counts, [1000 * (one["apply_s"] + one["restore_s"]) for one in times], "o-", label=who)
    stock = [result["loras"][count]["stock"] for count in counts]
    axes.plot(counts, [50 * (one["apply_s"] + one["restore_s"]) for one in stock], "--", color="tab:red", label="goal")
    axes.set(xlabel="LoRAs of rank 32", ylabel="apply and restore, ms", yscale="log")
    axes.legend(fontsize=9)


def _rendering(axes: Any, result: Mapping[str, Any]) -> None:
    table = {name: row for name, row in result["table"]["rows"].items() if "failed" not in row}
    apart = {name: f"{name} (up to {row['difference']['max']} of 255)" for name, row in table.items()}
    _bars(axes, {apart[name]: row["ratio"]["median"] for name, row in table.items()}, "pictures per second / baseline")
    _goal(axes, result["table"]["goal"]["ratio"])


def _layers(axes: Any, result: Mapping[str, Any]) -> None:
    for count in dict.fromkeys(point["loras"] for point in result["points"]):
        points = [point for point in result["points"] if point["loras"] == count]
        at, switches = [point["modules"] for point in points], [point["switch_s"] for point in points]
        axes.plot(at, [1000 * one["median"] for one in switches], "o-", label=f"{count} LoRA{'s' * (count > 1)}")
        ends = [[1000 * one[end] for one in switches] for end in ("min", "max")]
        axes.fill_between(at, *ends, alpha=0.15)
    limits = {case["weights"]: 1000 * case["limit_s"]["median"] for case in result["cases"].values()}
    axes.plot(*zip(*sorted(limits.items()), strict=True), "--", color="0.4", label="moving the weights")
    axes.set(xlabel="layers that are changed", ylabel="apply and restore, ms", ylim=(0, None))
    axes.legend(fontsize=9)


def _ranks(axes: Any, result: Mapping[str, Any]) -> None:
    cases = {int(rank): case for rank, case in sorted(result["cases"].items(), key=lambda entry: int(entry[0]))}
    switches = {
        "from host memory": [case["switch_s"]["median"] for case in cases.values()],
        "sent ahead": [case["sent_ahead_apply_s"]["median"] + case["restore_s"]["median"] for case in cases.values()],
        "moving the weights": [case["limit_s"]["median"] for case in cases.values()],
    }
    for name, seconds in switches.items():
        axes.plot(list(cases), [1000 * one for one in seconds], "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(cases), [str(rank) for rank in cases])
    axes.set(xlabel="rank", ylabel="apply and restore, ms", ylim=(0, None))
    axes.legend(fontsize=9)


def _formats(axes: Any, result: Mapping[str, Any]) -> None:
    cases = result["cases"].items()
    _bars(axes, {name: 1000 * case["switch_s"]["median"] for name, case in cases}, "apply and restore, ms")


def _images(axes: Any, result: Mapping[str, Any]) -> None:
    seconds = {name: spread["median"] for name, spread in result["seconds_an_image"].items()}
    _bars(axes, {name: 1 / spent for name, spent in seconds.items()}, "images per second")
    _goal(axes, 1.8 / seconds["worker-sdxl"])


def _compile_cache(axes: Any, result: Mapping[str, Any]) -> None:
    stages = ("imports_s", "model_s", "compiling_s", "picture_s")
    _stacks(axes, {name: {stage: start[stage] for stage in stages} for name, start in result["starts"].items()})


def _merge_kernel(axes: Any, result: Mapping[str, Any]) -> None:
    cases = {name: case["1"]["copy_ratio"]["median"] for name, case in result["cases"].items()}
    _bars(axes, cases, "merging one LoRA / copying the weights once")


def _steps(axes: Any, result: Mapping[str, Any]) -> None:
    ratios = {name: sampler["ratio"]["median"] for name, sampler in result["samplers"].items()}
    _bars(axes, ratios, "time of a picture / that with diffusers' schedule")


def _cold_start(axes: Any, result: Mapping[str, Any]) -> None:
    beside = ("total", "processor")
    stages = {
        who: {stage: spent for stage, spent in one.items() if stage not in beside}
        for who, one in result["stages_s"].items()
    }
    _stacks(axes, stages)


def _utilisation(axes: Any, result: Mapping[str, Any]) -> None:
    samples = result["samples"]
    axes.plot(samples["at_s"], samples["percent"], linewidth=0.8)
    busy = f"{result['busy_percent']:.1f} %" if samples["percent"] else "not measured"
    axes.set(xlabel="seconds", ylabel=f"device busy, % (on average {busy})", ylim=(0, 105))


PLOTS: Mapping[str, Draw] = {
    "whole_request": _whole_request,
    "handler": _handler,
    "memory": _memory,
    "switching": _switching,
    "lora_layers": _layers,
    "lora_ranks": _ranks,
    "lora_formats": _formats,
    "cold_start": _cold_start,
    "merge_kernel": _merge_kernel,
    "steps": _steps,
    "rendering": _rendering,
    "images_per_second": _images,
    "compile_cache": _compile_cache,
    "utilisation": _utilisation,
}
