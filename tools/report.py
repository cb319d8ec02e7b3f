"""Plot one run or several: ``python tools/report.py RUN... [--out FILE]`` writes report.html, several runs overlaid."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bigtrain.config.errors import UserError
from bigtrain.telemetry.report import REPORT_FILE, write_report


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 where the user has something to fix."""
    parser = argparse.ArgumentParser(description="Plot one run or several (overlaid) into a self-contained HTML page.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, such as runs/default")
    parser.add_argument(
        "--out", type=Path, help=f"file to write; default RUN/{REPORT_FILE}, or ./{REPORT_FILE} for several runs"
    )
    options = parser.parse_args(arguments)
    out = options.out or (Path(REPORT_FILE) if len(options.runs) > 1 else options.runs[0] / REPORT_FILE)
    try:
        print(write_report(options.runs, out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {out}: cannot write the report: {error.strerror}. Give another place with --out.", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
