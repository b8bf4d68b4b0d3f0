"""How the API serves where nobody says otherwise. Without imports, so that --help stays quick.

On a CPU a batch takes about as long as its images one by one, so small batches answer sooner.
"""

PORT = 8000
QUEUE = 64
# Seconds.
DEADLINE = 300.0
BATCH_SIZE = 8
