"""What is made of the records of a run: the figures of the report, beside published ones, as tables and charts.

It needs no model: a report can be written again at any time."""
