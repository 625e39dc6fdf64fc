"""`coati doctor`, `coati plan`, `coati report` and `coati run`."""

import argparse
import sys
from pathlib import Path

from coati.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """The `coati` command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="coati", description="SFT, reward models and RLHF on Colossal-AI.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="versions, devices, and which plugins can run here")
    commands.add_parser("plan", help="memory of a run on every rank, before it is started")
    report = commands.add_parser("report", help="one HTML page of curves, samples and settings")
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, or one that holds several"
    )
    report.add_argument("--output", type=Path, help="the page (default: report.html in the first folder)")
    run = commands.add_parser("run", help="start a script on every GPU of this machine")
    run.add_argument("--nproc_per_node", type=int, required=True, metavar="N", help="how many processes")
    run.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT.py ...", help="the script and its arguments")
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["plan"]:  # its flags are those of the training scripts
            from coati.planner import main as plan

            return plan(argv[1:])
        arguments = parser.parse_args(argv)
        if arguments.command == "doctor":
            from coati.doctor import diagnose

            return diagnose()
        if arguments.command == "run":
            from coati.run import run as start

            if arguments.nproc_per_node < 1 or not arguments.script:
                raise UserError("say what to start: coati run --nproc_per_node 2 SCRIPT.py --config FILE.yaml")
            return start(arguments.nproc_per_node, arguments.script)
        from coati.tracking import write_report

        print(write_report(arguments.runs, arguments.output or arguments.runs[0] / "report.html"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
