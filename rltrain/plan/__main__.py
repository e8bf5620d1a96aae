"""Command line of the plan: memory of a rank under every sharding plan, and seconds of every stage of a step.

python -m rltrain.plan +experiment=NAME [key=value …] [device=H200|H100|A100|L40S|4090|cpu] [nodes=1] [gpus_per_node=1]
                       [gpu_gib=GIB] [prompt_tokens=MEAN] [new_tokens=MEAN] [--json]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.errors import ConfigError
from rltrain.plan.devices import DEVICES, GIB, Device
from rltrain.plan.memory import Cluster, Plan, as_json, naive_logits_bytes, plan
from rltrain.plan.model_shape import architecture
from rltrain.plan.time import Times, estimate, work_of

COLUMNS = ("ZeRO", "offload", "checkpointing", "weights", "gradients", "optimiser", "frozen", "activations", "head")
COLUMNS += ("buffers", "sampler", "KV cache", "slack", "peak", "fits")


def main() -> None:
    """Arguments that are not of the cluster go to the config."""
    with cli.errors_in_one_line():
        cluster, rest = cluster_of([argument for argument in sys.argv[1:] if argument != "--json"])
    task: Any = partial(report, cluster=cluster, as_text="--json" not in sys.argv)
    sys.argv[1:] = rest
    cli.run(task)


def cluster_of(arguments: Sequence[str]) -> tuple[Cluster, list[str]]:
    """The cluster that the command line names, and the arguments that are left for the config."""
    types = {field.name: type(field.default) for field in dataclasses.fields(Cluster)}
    values, rest = {}, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in types:
            rest.append(argument)
            continue
        try:
            values[key] = types[key](value)
        except ValueError:
            raise ConfigError(f"{argument}: not a number; set for example {key}=8") from None
    return Cluster(**values), rest


def report(config: RunConfig, *, cluster: Cluster, as_text: bool) -> None:
    """Print the plan of a config."""
    made = plan(config, cluster, on_gpu=cluster.device != "cpu")
    device = device_for(config, made)
    times = {count: estimate(config, made.shape, device, scaled) for count, scaled in wider(cluster)}
    if as_text:
        show(made)
        show_times(times, cluster, device)
    else:
        print(as_json(made, times))


def device_for(config: RunConfig, made: Plan) -> Device:
    """The row of the table, or this CPU, measured for a second."""
    if made.cluster.device != "cpu":
        return DEVICES[made.cluster.device]
    from rltrain.plan.calibration import this_cpu

    load, work = made.load, work_of(config, made.cluster)
    return this_cpu(
        config.model, architecture(config.model), made.shape, work, rows=load.rows, tokens=load.tokens
    )  # fmt: skip


def wider(cluster: Cluster) -> list[tuple[int, Cluster]]:
    """The cluster, and on GPUs powers of two up to 1,024 ranks in nodes of eight, each with a prompt at least."""
    counts = [2**power for power in range(11)] if cluster.device != "cpu" else []
    sizes = {count: dataclasses.replace(cluster, nodes=-(-count // 8), gpus_per_node=min(count, 8)) for count in counts}
    sizes[cluster.ranks] = cluster
    return sorted(sizes.items())


def show_times(times: dict[int, Times], cluster: Cluster, device: Device) -> None:
    """A line per number of ranks, the configured one marked."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"seconds a step by stage, {device.name}, lengths as stated, at stated shares of its peaks")
    for name in ("ranks", *next(iter(times.values())).seconds, "step", "longest"):
        table.add_column(name, justify="right")
    for count, found in times.items():
        mark = "*" if count == cluster.ranks else ""
        cells = [f"{count}{mark}", *(f"{seconds:.2f}" for seconds in found.seconds.values()), f"{found.total:.2f}"]
        table.add_row(*cells, found.dominant, style="bold" if mark else None)
    Console(width=max(Console().width, 150)).print(table)


def show(made: Plan) -> None:
    """The table, in GiB per rank."""
    from rich.console import Console

    shape, load, cluster = made.shape, made.load, made.cluster
    avoided = naive_logits_bytes(shape, load.loss_tokens) / GIB
    print(
        f"{shape.parameters / 1e6:,.1f} M parameters, {shape.trainable / 1e6:,.1f} M trained; {cluster.ranks} ranks of "
        f"{cluster.gpu_gib:g} GiB\nmicro-batch: {load.rows} rows x {load.tokens} tokens; sampling: {load.completions} "
        f"completions of {load.prompts} prompts; logits avoided: {avoided:.2f} GiB"
    )
    Console(width=max(Console().width, 150)).print(table_of(made))
    host = max(footprint.host for footprint in made.footprints.values()) * cluster.gpus_per_node / GIB
    loading = made.loading * cluster.gpus_per_node / GIB
    print(
        f"* as configured. Of a node's own memory loading takes up to {loading:.1f} GiB beside the files' pages, and "
        f"offloading up to {host:.1f} GiB."
    )


def table_of(made: Plan) -> Any:
    """One row per sharding plan."""
    from rich.table import Table

    table = Table(title="GiB per rank")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for sharding, footprint in made.footprints.items():
        sizes = [
            *(footprint.weights, footprint.gradients, footprint.optimizer, footprint.frozen, footprint.activations),
            *(
                footprint.head,
                footprint.buffers,
                footprint.sampler,
                footprint.kv_cache,
                footprint.slack,
                footprint.peak,
            ),
        ]
        switches = ["yes" if flag else "" for flag in (sharding.offload_optimizer, sharding.gradient_checkpointing)]
        mark = "*" if sharding == made.chosen else ""
        cells = [f"{sharding.zero_stage}{mark}", *switches, *(f"{size / GIB:.2f}" for size in sizes)]
        table.add_row(*cells, "yes" if made.fits(sharding) else "no", style="bold" if mark else None)
    return table


if __name__ == "__main__":
    main()
