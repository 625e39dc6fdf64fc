"""What is asked: the published benchmarks, read out of their files into one record a question.

A benchmark is prepared once; all that comes later reads the prepared folder."""
