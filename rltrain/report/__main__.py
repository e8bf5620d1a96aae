"""A self-contained HTML page about runs: results, warnings, every token's credit, and what was run.

rltrain report runs/tempo                                      writes runs/tempo/report.html
rltrain report runs/spae --estimators grpo,tempo,spae          the same groups under three estimators
rltrain report runs/grpo runs/tempo --out report.html          several runs in the same charts
rltrain report runs                                            a page per run, and an index of them
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rltrain import cli
from rltrain.errors import ConfigError, require


def main() -> None:
    """Write the page and say where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m rltrain.report", description="A self-contained HTML page about runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder of runs")
    parser.add_argument(
        "--out", type=Path, help="the file to write (default: report.html, in the folder if only one is given)"
    )
    parser.add_argument(
        "--estimators", default="", metavar="A,B", help="show the sampled groups under these algorithms side by side"
    )
    parser.add_argument("--groups", type=int, default=6, help="sampled groups per run (default 6)")
    parser.add_argument("--step", type=int, help="the step whose samples are shown (default: the last)")
    flags = parser.parse_args()
    cli.setup_logging()
    with cli.errors_in_one_line():
        write(flags)


def write(flags: argparse.Namespace) -> None:
    """Check the flags, build, write."""
    from rltrain.compare.folders import run_folders
    from rltrain.report import estimators, index, page

    for folder in flags.runs:
        require(folder.is_dir(), f"{folder}: no such folder; give the folder of a run, or of several")
    require(flags.groups >= 1, f"--groups {flags.groups}: set at least 1")
    names = [name for name in flags.estimators.split(",") if name]
    estimators.check(names)
    out = flags.out or (flags.runs[0] if len(flags.runs) == 1 else Path()) / "report.html"
    build = partial(page.build, estimators=names, groups=flags.groups, step=flags.step)
    found = {folder: run_folders(folder) for folder in flags.runs}
    if all(runs in ([], [folder]) for folder, runs in found.items()):  # one without any run is a page of notes
        _save(out, build(flags.runs))
        return
    folders = list(dict.fromkeys(run for runs in found.values() for run in runs))
    reports = [folder / "report.html" for folder in folders]
    for folder, report in zip(folders, reports, strict=True):
        _save(report, build([folder]))
    title = ", ".join(folder.resolve().name for folder in flags.runs)
    _save(out, index.build(folders, reports, out=out, title=title))


def _save(out: Path, html: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); choose another file") from error
    print(f"written to {out} ({len(html.encode()) / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
