"""`modelchain bench`: our trainer against a stock loop of open_clip's public pieces, interleaved in one run."""
