"""Loading side by side with other loaders and with raw reads: cold, warm, small tensors, every kind of device.

Ours and each rival alternate in one run; what is reported is the median of the paired ratios of time until
every page of every tensor is resident, with a bootstrap interval. What was read from the block device is
counted in the reading process, so that cold and warm are shown, not assumed. Each repetition is forked from
a process that has imported everything. Loaders: Run:ai's streamer, fastsafetensors, InstantTensor (only with
a device) and safetensors itself; `pip install 'headrace[bench]'` brings them, and those that are missing are
left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.cases import CASES, STAGING
from benchmarks.contest import Contest, Result
from benchmarks.measure import end_cleanly, machine
from benchmarks.places import Unavailable
from benchmarks.repetition import Failed
from benchmarks.staged import measure_staging


def main(argv: Sequence[str] | None = None) -> int:
    names = [*(case.name for case in CASES), STAGING]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="small models and few pairs: does it work at all"
    )
    parser.add_argument(
        "--case", action="append", choices=names, metavar="NAME", help=f"only this one: {', '.join(names)}"
    )
    parser.add_argument("--pairs", type=int, default=0, help="pairs of each case")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="begin no further pair of a case after this time"
    )
    parser.add_argument("--size", type=float, default=4.0, help="GB of the model (some cases take a part)")
    parser.add_argument("--only", nargs="+", metavar="LOADER", help="no other rivals than these")
    parser.add_argument(
        "--device", default="cpu", help="cuda:N: the cases with a device (default: those without)"
    )
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there (png, svg, pdf); needs matplotlib")
    options = parser.parse_args(argv)
    on_device = options.device.startswith("cuda")
    if options.case is None:
        options.case = [case.name for case in CASES if case.device == on_device]
        options.case += [] if on_device else [STAGING]
    size = int((0.06 if options.smoke else options.size) * 1e9)
    report: dict[str, Any] = {"machine": "", "cases": {}}
    results: list[Result] = []
    failed = False
    end_cleanly()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        scratch = Path(folder)
        report["machine"] = machine(scratch)
        print(report["machine"])
        for case in CASES:
            if case.name not in options.case:
                continue
            contest = Contest(
                case, options.device, size, options.pairs, options.smoke, options.only, options.seconds
            )
            try:
                result = contest.run(scratch)
            except (Unavailable, Failed) as reason:
                how = "failed" if isinstance(reason, Failed) else "left out"
                failed = failed or how == "failed"
                print(f"\n{case.name}: {case.title}\n  {how}: {reason}", flush=True)
                report["cases"][case.name] = {how: str(reason)}
                continue
            except SystemExit:  # ended by a signal: what is there is worth something
                if contest.result is not None:
                    print(f"\n{contest.result.table()}\n  (ended early)", flush=True)
                raise
            print(f"\n{result.table()}", flush=True)
            results.append(result)
            report["cases"][case.name] = result.as_json()
        if STAGING in options.case:
            report["cases"][STAGING] = measure_staging(scratch, size, options.pairs, options.smoke)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))
    if options.plot:
        from benchmarks.plots import draw

        draw(results, Path(options.plot))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
