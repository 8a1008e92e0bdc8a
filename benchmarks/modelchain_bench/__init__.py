"""`modelchain bench`: our trainer against a stock loop of open_clip's public pieces, interleaved in
one run.
"""

# What makes a step fast and nothing else; the benchmark alone can switch them off, to see what each
# is worth.
LEVERS = ("chunks", "pooled", "lookup", "fused", "compiled")
