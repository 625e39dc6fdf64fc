"""Runs on the CPU in float32 that a GPU's are compared with: `python -m tests.gpu.reference JOB`."""

import json
import sys
from pathlib import Path

from coati.config import configure
from coati.parallel import launch
from coati.parallel.runtime import shutdown
from tests.conftest import settings_for, trainer_classes


def main():
    job = json.loads(sys.argv[1])
    runtime = launch(0)
    for algorithm in job["algorithms"]:
        config_class, trainer_class = trainer_classes(algorithm)
        output = str(Path(job["folder"]) / algorithm)
        settings = settings_for(algorithm, job["world"], output_dir=output, plugin="ddp", precision="fp32")
        trainer_class(configure(config_class, **settings), runtime).train()
    shutdown()


if __name__ == "__main__":
    main()
