"""Hooks of mkdocs (mkdocs.yml names this file): pages that are not files of docs/, and the links between all.

The README is the home page of the site; CONTRIBUTING, the changelog and the READMEs of examples and applications are
pages too. They are written for readers of the repository, so their links are rewritten: to a page of the site where
there is one, to plain text where there is none. The reference has a page for each package of `REFERENCE`, with the
docstring of each public name.

mkdocs is imported where it is needed: a test reads the names of the pages without it.
"""

import ast
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FROM_OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "applications/colossal_eval/README.md": "colossal-eval.md",
    "applications/colossal_llama/README.md": "colossal-llama.md",
}
SOURCE_OF = {page: source for source, page in FROM_OUTSIDE.items()}
# A package's public names are those of its __all__; for packages without one, they are listed here.
REFERENCE: dict[str, list[str]] = {
    "losses": [],
    "data": [],
    "models": [],
    "rewards": [],
    "rollout": [],
    "trainers": [
        "sft.SFTTrainer",
        "reward.RewardTrainer",
        "dpo.DPOTrainer",
        "kto.KTOTrainer",
        "ppo.PPOTrainer",
        "grpo.GRPOTrainer",
        "distill.DistillTrainer",
        "sdpo.SDPOTrainer",
        "supervised.SupervisedTrainer",
        "rollouts.RolloutTrainer",
        "trainer.Trainer",
    ],
    "parallel": [],
    "planner": ["dry_run.Workload", "dry_run.Plan", "dry_run.plan", "report.main"],
    "tracking": [],
}
PAGES = [*FROM_OUTSIDE.values(), *(f"reference/{package}.md" for package in REFERENCE)]
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:)([^)#]*)(#[^)]*)?\)")


def on_files(files, config):
    """Adds the pages of `PAGES`, and the pictures that those from outside docs/ show."""
    from mkdocs.structure.files import File

    for source, page in FROM_OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        for is_picture, _, target, _ in LINK.findall(text):
            path = (ROOT / source).parent / target
            if is_picture and not path.is_relative_to(ROOT / "docs"):
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    for package in REFERENCE:
        files.append(File.generated(config, f"reference/{package}.md", content=reference_page(package)))
    return files


def reference_page(package: str) -> str:
    """A page that asks mkdocstrings for a package's docstring and for those of its public names."""
    names = [f"coati.{package}.{name}" for name in REFERENCE[package]] or public_names(package)
    entries = "".join(f"\n::: {name}\n" for name in names)
    options = "    options: {members: false, show_root_toc_entry: false, show_root_heading: false}"
    return f"# coati.{package}\n\n::: coati.{package}\n{options}\n{entries}"


def public_names(package: str) -> list[str]:
    """Where the names of a package's `__all__` are defined, by its imports and its table `HOME` of late imports."""
    home, public = {}, []
    for node in ast.walk(ast.parse((ROOT / "coati" / package / "__init__.py").read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module=module, names=names):
                home |= {alias.name: f"{module}.{alias.name}" for alias in names}
            case ast.Assign(targets=[ast.Name(id="HOME")], value=table):
                table = ast.literal_eval(table)
                home |= {name: f"coati.{package}.{module}.{name}" for name, module in table.items()}
                public += table
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=names)):
                public += [name.value for name in names if isinstance(name, ast.Constant)]
    return [home.get(name, f"coati.{package}.{name}") for name in public]


def on_page_markdown(markdown, page, config, files):
    """Rewrites links; of a code block's language it drops the second word, which is for the tests."""
    here = page.file.src_uri
    source = ROOT / SOURCE_OF.get(here, f"docs/{here}")

    def rewritten(link: re.Match) -> str:
        is_picture, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target:
            return link[0]
        path = Path(os.path.normpath(source.parent / target)).relative_to(ROOT).as_posix()
        uri = FROM_OUTSIDE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return link[0] if path.startswith("docs/") else text
        return f"{is_picture}[{text}]({os.path.relpath(uri, os.path.dirname(here) or '.')}{anchor})"

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(rewritten, text) for text in parts[::2]]
    parts[1::2] = [re.sub(r"^(```\w+) .*", r"\1", code) for code in parts[1::2]]
    return "".join(parts)
