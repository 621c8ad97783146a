"""The parts of bench_optim.py and gpu_check.py, none importing a later: shapes, clock, memory,
workload, candidates, measure, table, chart; outcomes, tolerances, cases, subject, checks, graph,
gpu_measures, sanitizer."""
