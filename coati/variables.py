"""Environment variables by which a launcher and the processes that it starts find each other."""

LAUNCHER = "COATI_LAUNCHER"  # the process number of `coati run`
SECONDS_TO_SAVE = "COATI_SECONDS_TO_SAVE"  # that a process has to save once its launcher is gone
GENERATORS = "COATI_GENERATORS"  # how many there are
GENERATORS_FOLDER = "COATI_GENERATORS_FOLDER"  # where they write their addresses
GENERATOR = "COATI_GENERATOR"  # a generator's own number
GENERATOR_HOST = "COATI_GENERATOR_HOST"  # the name or address that it listens at
