"""How the API serves where nobody says otherwise. Without imports, so that --help stays quick.

An image is answered with its whole batch, so small batches answer sooner.
"""

PORT = 8000
QUEUE = 64
# Seconds.
DEADLINE = 300.0
BATCH_SIZE = 8
