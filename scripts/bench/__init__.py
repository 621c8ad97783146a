"""The parts of bench_optim.py, none importing a later: shapes, clock, memory, workload, candidates,
measure, table, chart."""
