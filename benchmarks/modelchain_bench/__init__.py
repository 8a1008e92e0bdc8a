"""`modelchain bench`: our trainer against a stock loop of open_clip's public pieces, interleaved in
one run.
"""

# Parts of a step that change its speed only. The benchmark can switch them off, to measure each.
LEVERS = ("chunks", "pooled", "lookup", "fused", "compiled")
