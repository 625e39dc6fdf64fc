"""The `coati` command: methods that train, and tools."""

import argparse
import sys
from pathlib import Path

from coati.errors import UserError

TOOLS = {
    "init": "a commented configuration of a method, for the hardware of this machine",
    "run": "start a method on every GPU of this machine: coati run --nproc_per_node 8 ppo --config FILE.yaml",
    "plan": "memory of a run on every rank, before it is started",
    "play": "an episode with an environment, step by step: be the policy, or see what a model does",
    "label": "a web page on which people compare responses; export of what they chose as training data",
    "serve": "models behind an OpenAI-compatible HTTP API",
    "chat": "talk to a model on the terminal, or compare two",
    "serve-reward": "rewards behind HTTP, for runs elsewhere",
    "check-reward": "what a reward pays for responses that try to be paid without being right",
    "report": "one HTML page of curves, samples and settings",
    "doctor": "versions, devices, and which plugins can run here",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status (a method that trains ends the process with its own)."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(overview())
        elif name in TOOLS:
            return run_tool(name, rest)
        else:
            from coati.commands import COMMANDS, train

            if name not in COMMANDS:
                raise UserError(f"there is no command {name!r}: coati --help lists them")
            train(name, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """All commands, in groups."""
    from coati.commands import GROUPS

    groups = {f"train {group}": {c.name: c.title for c in members} for group, members in GROUPS.items()}
    groups["tools"] = TOOLS
    lines = ["usage: coati COMMAND --config FILE.yaml [--SETTING VALUE ...]", ""]
    for title, members in groups.items():
        lines += [f"{title}:", *(f"  {name:<14}{text}" for name, text in members.items()), ""]
    return "\n".join([*lines, "coati COMMAND --help lists a command's settings."])


def run_tool(name: str, argv: list[str]) -> int:
    """Runs one of `TOOLS`."""
    if name == "plan":  # its flags are those of the methods
        from coati.planner import main as plan

        return plan(argv)
    if name == "label":
        from coati.label.command import main as label

        return label(argv)
    if name == "serve-reward":
        from coati.serve.rewards import main as serve_reward

        return serve_reward(argv)
    if name == "check-reward":  # settings, as the methods have them
        from coati.check_reward import main as check_reward

        return check_reward(argv)
    parser = argparse.ArgumentParser(prog=f"coati {name}", description=TOOLS[name])
    if name == "init":
        from coati.commands import COMMANDS

        parser.add_argument("method", choices=list(COMMANDS), metavar="METHOD", help=", ".join(COMMANDS))
        options = parser.parse_args(argv)
        from coati.initial import initial_settings

        print(initial_settings(options.method))
    elif name == "play":
        add_play_arguments(parser)
        play_episode(parser.parse_args(argv))
    elif name == "serve":
        from coati.serve import server

        server.add_arguments(parser)
        return server.serve(parser.parse_args(argv))
    elif name == "chat":
        from coati.serve import chat

        chat.add_arguments(parser)
        return chat.main(parser.parse_args(argv))
    elif name == "report":
        parser.add_argument(
            "runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, or one that holds several"
        )
        parser.add_argument("--output", type=Path, help="the page (default: report.html in the first folder)")
        parser.add_argument("--watch", action="store_true", help="write it again whenever a run has logged something")
        options = parser.parse_args(argv)
        from coati.tracking import watch_report, write_report

        output = options.output or options.runs[0] / "report.html"
        print(output, flush=True)
        write = watch_report if options.watch else write_report
        write(options.runs, output)
    elif name == "run":
        parser.add_argument("--nproc_per_node", type=int, required=True, metavar="N", help="how many processes")
        parser.add_argument(
            "--generators", type=int, default=0, metavar="G", help="so many more, which sample for those that train"
        )
        parser.add_argument(
            "command", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="a method or a script, and its arguments"
        )
        options = parser.parse_args(argv)
        return start(options.nproc_per_node, options.command, options.generators)
    else:
        parser.parse_args(argv)
        from coati.doctor import diagnose

        return diagnose()
    return 0


def add_play_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("environment", help="FILE.py:Class or module:Class, see docs/environments.md")
    parser.add_argument("--rows", type=Path, help="a .jsonl file; an empty row if there is none")
    parser.add_argument("--row", type=int, default=0, help="which row begins the episode (default: 0)")
    parser.add_argument("--model", help="plays in your place")
    parser.add_argument("--max_turns", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=1024, help="longest episode of a model")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest response of a model")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--call_format", default="auto", help="how tools are called (default: as you type least)")


def play_episode(options: argparse.Namespace):
    """An episode on the terminal."""
    from coati.config import configure
    from coati.config.environment import EnvironmentConfig
    from coati.config.generation import GenerationConfig
    from coati.play import play, read_row, show_episode

    names = ("max_turns", "max_tokens", "call_format")
    limits = configure(EnvironmentConfig, **{name: getattr(options, name) for name in names})
    row = read_row(options.rows, options.row) if options.rows else {}
    if options.model is None:
        return play(options.environment, row, limits, lambda: input("assistant "), print)
    sampling = configure(GenerationConfig, max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    wait = (lambda: input("[Enter] ")) if sys.stdin.isatty() else (lambda: None)
    show_episode(options.environment, row, options.model, limits, sampling, wait, print)


def start(processes: int, command: list[str], generators: int = 0) -> int:
    """Starts a method or a Python script so many times, and so many generators for it."""
    from coati.commands import COMMANDS
    from coati.run import run

    if processes < 1 or generators < 0 or not command:
        raise UserError("say what to start: coati run --nproc_per_node 2 ppo --config FILE.yaml")
    is_method = command[0] in COMMANDS
    return run(processes, ["-m", "coati.cli", *command] if is_method else command, generators)


if __name__ == "__main__":
    sys.exit(main())
