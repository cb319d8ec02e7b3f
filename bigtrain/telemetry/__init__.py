"""What a run tells the world: metrics.jsonl, the console, W&B, report.html, and how fast the hardware could go.

Rank 0 writes, the other ranks write nothing. Only `peak` needs torch.
"""
