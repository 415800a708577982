"""Tests, ceilings and benchmarks on one GPU: one command, no network, under nine minutes.

    python benchmarks/gpu.py                     # writes benchmarks/results/gpu-<device>.json, .md
    python benchmarks/gpu.py --quick --skip-tests --only head
    python benchmarks/gpu.py --tune --tune-seconds 300 --only head
    python benchmarks/gpu.py --dry-run           # the same flow on a CPU, tiny: measures nothing

Needs torch with its triton, and pytest for the tests; the compiled extension is built where a
compiler is. Peers are measured where they can be imported (benchmarks/results/README.md says how to
carry them). Exits with status 1 where a test failed or one of our results was wrong.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]
SECTIONS = ("head", "gibbs", "perturb")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results)")
    parser.add_argument("--name", help="the files are gpu-NAME.json and .md (the device's name)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shapes")
    parser.add_argument("--skip-tests", action="store_true", help="neither build nor test")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="may be repeated")
    parser.add_argument("--seconds", type=float, default=500, help="begin nothing new after these")
    parser.add_argument("--tune", action="store_true", help="try other settings of the kernels")
    parser.add_argument("--tune-seconds", type=float, default=240)
    parser.add_argument("--commit", help="what to record where there is no git repository")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU; measures nothing")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    from benchmarks import gpu_checks, gpu_report
    from benchmarks.measure import Bench

    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU is usable here; --dry-run goes through the same steps on a CPU")
    device = torch.device("cpu" if args.dry_run else "cuda")
    out = args.out or ROOT / "benchmarks" / "results"
    if args.dry_run and args.out is None:
        out = Path(tempfile.mkdtemp(prefix="vcore-dry-run-"))
    begin = time.monotonic()
    rounds = 7 if args.quick else 21
    bench = Bench(device, args.dry_run, rounds, deadline=begin + args.seconds)
    facts = gpu_report.environment(device, args.commit)
    name = args.name or gpu_report.default_name(device)
    report = gpu_report.Report(out, name, facts, args.dry_run)
    bench.on_figures = report.write

    def step(title: str) -> None:
        print(f"== {title} ({time.monotonic() - begin:.0f} s)", flush=True)

    if args.dry_run or args.skip_tests:
        report.checks["tests"] = "skipped"
    else:
        step("building the extension")
        report.checks["build"] = gpu_checks.build(limit=90)
        step("tests marked gpu")
        report.checks["tests"] = gpu_checks.run_tests(limit=0.4 * args.seconds)
        step("compute-sanitizer memcheck")
        report.checks["memcheck"] = gpu_checks.memcheck(limit=0.12 * args.seconds)
        report.write(bench)
        for title in ("tests", "memcheck"):
            print(report.checks[title], flush=True)

    # After the build, so that the new library is the one that is loaded.
    from benchmarks import gpu_ceilings, gpu_gibbs, gpu_head, gpu_perturb

    sections: dict[str, Callable[[], None]] = {
        "ceilings": lambda: gpu_ceilings.run(bench),
        "gibbs": lambda: gpu_gibbs.run(bench),
        "perturb": lambda: gpu_perturb.run(bench),
        "head": lambda: gpu_head.run(bench, args.quick),
    }
    for title, run in sections.items():
        if title == "ceilings" or title in (args.only or SECTIONS):
            step(title)
            try:
                run()
            except RuntimeError as error:  # what the others measure is not lost
                bench.failures.append(f"{title}: {error}")
    if args.tune:
        from benchmarks import gpu_tune

        step("tuning")
        gpu_tune.run(bench, report, args.tune_seconds)
    report.finished = True
    report.write(bench)
    step("done")
    print(gpu_report.short_table(bench))
    print(f"\n{out}/gpu-{name}.md")
    tests = report.checks.get("tests", {})
    failed = bench.failures + (tests.get("failures", []) if isinstance(tests, dict) else [])
    if failed:
        raise SystemExit("\n".join(map(str, failed)))


if __name__ == "__main__":
    main()
